"""How values and foreign errors are worded in one-line messages."""

import errno
import json
import reprlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LFS = b"version https://git-lfs"  # what the pointer to a large file begins with


class Mistake(ValueError):
    """Something that the user can mend, in one line that says how; in the loop only this is no crash of ours."""


def show(value: Any) -> str:
    """A value, short however large it is; null, true and false as JSON has them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def listed(items: Sequence[str], most: int) -> str:
    """The first `most` items, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def readable(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"


def cannot_write(what: str, folder: Path, error: OSError) -> str:
    """That something in a folder can't be written and why, as the beginning of a message."""
    reason = error.strerror or first_line(error)
    if error.errno == errno.ENOSPC:
        usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
        reason += f" ({usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB are free)"
    return f"{what} can't be written: {reason}"


def check_no_pointer(file: Path) -> None:
    """Raises a ValueError if Git LFS has left its pointer in the place of a file."""
    with suppress(OSError), open(file, "rb") as opened:
        if opened.read(len(LFS)) == LFS:
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself: git lfs pull in its folder fetches it")
