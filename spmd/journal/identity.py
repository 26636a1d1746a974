"""Whether a run may go on from what lies at its output: only where it was made with the same model and sampling.

Every file that holds answers begins with a header, or has one beside it, whose "identity" says what all its answers
depend on besides their rows. Headers are written before the first answer and never changed.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spmd.journal.format import Header, JournalFile, read_header
from spmd.journal.paths import Paths

INSTEAD = "choose another output, or resume=fresh to answer everything anew"


def check_identity(paths: Paths, output: str, header: Header) -> None:
    """Check that there are no answers, or only such as a run with this header can go on from. Only reads.

    Raises:
        ValueError: answers that no run made, or one whose identity differs; it names what differs.
    """
    begun = [path for path in (paths.answered, *paths.parts()) if holds_answers(path)]
    finished = holds_output(paths)
    if finished and not begun and not paths.keys.exists() and header_of(paths.answered) is None:
        raise ValueError(
            f"output={output} exists without {paths.keys.name}, which a run leaves beside its answers: {INSTEAD}"
        )
    if not finished and not begun:
        return
    beside = [path for path in (paths.keys, paths.unused) if path.exists()] if finished else []
    for path in (*begun, *beside):
        made = header_of(path)
        if made is None:
            raise ValueError(f"{path} doesn't begin as a run would have written it: {INSTEAD}")
        if differs := _difference(made["identity"], header["identity"]):
            raise ValueError(
                f"output={output}: {path.name} was made with model.path={made.get('model.path')} and other settings: "
                f"{differs}; {INSTEAD}"
            )


def told_earlier(paths: Paths, name: str) -> Any:
    """What the answers that are there say they depend on under this name; None if nothing does, or can be read."""
    with suppress(OSError):  # which the journal tells of
        headers = map(header_of, (paths.answered, *paths.parts(), paths.keys, paths.unused))
        return next((made["identity"].get(name) for made in headers if made), None)
    return None


def holds_output(paths: Paths) -> bool:
    """Whether there are answers in the output itself. An empty file, as mktemp makes one, holds none."""
    return paths.output.exists() and paths.output.stat().st_size > 0


def holds_answers(path: Path) -> bool:
    """Whether there are answers in a journal file."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return any(True for _ in JournalFile(file).entries())


def header_of(path: Path) -> dict[str, Any] | None:
    """The header of a file; None if it is missing or has none."""
    try:
        with open(path, "rb") as file:
            return read_header(file)
    except FileNotFoundError:
        return None


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} was {json.dumps(theirs.get(name), ensure_ascii=False)}, "
        f"is {json.dumps(ours.get(name), ensure_ascii=False)}"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    )
