"""One plain file of all rows, made of whatever `input` names, for all ranks to read.

Rank 0 alone makes it, in the folder of the output's parts, whose lock it holds; the others read it once rank 0 has told
them where it lies. It stays until the output is complete. Beside it lies a note of what it was made from, which is
written last: without it the file isn't whole. A later start that is given the same files, of the same sizes and times,
takes it as it is, and else makes it anew; rows are known by their content, so either way no row is lost or answered
twice.

A stream can't be read twice. A start that the job makes by itself takes what was kept, for the first one had the
stream; one that a person makes reads what is sent now, or takes what was kept if nothing is.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from spmd.formats.content import blocks_of
from spmd.formats.sources import PIPE_IT, Source
from spmd.formats.table_rows import Columns
from spmd.messages import Mistake, cannot_write


def note_of(spooled: Path) -> Path:
    """The file that says what a spooled one was made from."""
    return spooled.with_suffix(".json")


def spool(sources: Sequence[Source], path: Path, columns: Columns, again: bool = False) -> None:
    """Make the plain file at `path`, or find that it is there.

    Args:
        columns: how those of tables are taken.
        again: the job has started itself again.

    Raises:
        Mistake: a source can't be read to its end, none has any rows, the disk is full; or the stream is gone.
    """
    made_from = [[columns.prompt], *(source.identity for source in sources)]
    kept, streamed = _note(path) == made_from, any(source.streamed for source in sources)
    if kept and (again or not streamed or sources[0].is_terminal):
        return
    if streamed and again:
        raise Mistake(
            f"input={sources[0].path} was read by this job's first start, which ended before all of it was kept: "
            f"start anew, with all rows"
        )
    if sources[0].is_terminal:
        raise Mistake(f"input={sources[0].path} is a terminal: {PIPE_IT}")
    anew = path.with_name(path.name + ".new")
    try:
        size = _write(anew, chain.from_iterable(blocks_of(source, columns) for source in sources))
        if size:
            note_of(path).unlink(missing_ok=True)
            os.replace(anew, path)
            note_of(path).write_text(json.dumps(made_from))
    except OSError as error:
        why = cannot_write(f"the copy of the input, {anew},", path.parent, error)
        raise Mistake(f"{why}; it needs room for all rows beside the output: mend that, then start again") from error
    finally:
        anew.unlink(missing_ok=True)
    if not size and not kept:
        raise Mistake(f"input={sources[0].path} is empty")


def remove(path: Path) -> None:
    """Remove the plain file, if there is one: the note first, without which it counts for nothing."""
    note_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def sample(sources: Iterable[Source], columns: Columns, most: int) -> bytes:
    """The beginning of all rows, about `most` bytes of whole lines; nothing of a stream, which can't be read twice.

    Raises:
        Mistake: as `spool`, for what was read.
    """
    found = b""
    for block in chain.from_iterable(blocks_of(source, columns) for source in sources if not source.streamed):
        found += block
        if len(found) >= most:
            return found[: found.rfind(b"\n", 0, most) + 1] or found
    return found


def _write(path: Path, blocks: Iterator[bytes]) -> int:
    """Returns how many bytes it wrote, which are on the disk then."""
    with open(path, "wb") as file:
        file.writelines(blocks)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _note(path: Path) -> object:
    """What a spooled file says that it was made from; None if it isn't whole."""
    try:
        return json.loads(note_of(path).read_bytes()) if path.exists() else None
    except (OSError, ValueError):
        return None
