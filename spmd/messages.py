"""How values and foreign errors are worded in one-line messages."""

import json
import reprlib
from collections.abc import Sequence
from typing import Any


def show(value: Any) -> str:
    """A value, short however large it is; null, true and false as JSON has them."""
    return json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)


def first_line(error: Exception) -> str:
    """The first line of an error's message, else its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def listed(items: Sequence[str], most: int) -> str:
    """The first `most` items, and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def readable(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.1f} MiB"
