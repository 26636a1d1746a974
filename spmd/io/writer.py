"""The output: each replica appends answers to a part file of its own, and rank 0 merges the parts at the end.

Parts lie in `<output>.parts/part-<dp_rank>.jsonl`. A line is the row's number, the time in nanoseconds, the key of the
row's content (`-` for a row without an answer) and the answer, separated by tabs; the answer is JSON, which holds no
raw tab. Every row is flushed, so `tail -f` shows it at once and a killed run loses at most a torn last line.

The next start with this output collects what was answered in `answered.jsonl` beside the parts. What counts is the
content of a row, not its place, so lines may have been added, removed or moved, and the topology may have changed.
"""

import heapq
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from spmd.io.wording import first_line

ANSWERED = "answered.jsonl"


def parts_folder(output: str) -> Path:
    """Where the parts of an output lie until they are merged: beside it, through symbolic links."""
    path = Path(output).resolve()
    return path.with_name(path.name + ".parts")


def prepare_output(output: str, input: str | None = None, resume: bool = False) -> list[int]:
    """Make the parts folder ready for this attempt. On rank 0, before others write.

    Returns:
        Keys of the rows that earlier attempts answered, which go into the output; none without `resume`.

    Raises:
        ValueError: the output is a directory, a device or the input, or its folder can't be written to.
    """
    path = Path(output).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"output={output} is {'a directory' if path.is_dir() else 'no regular file'}")
    if input is not None and Path(input).resolve() == path:
        raise ValueError(f"output={output} is the input: it would be overwritten")
    folder = parts_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keys = _collect(folder) if resume else []
        for pattern in ("part-*.jsonl", "*.tmp", *([] if resume else [ANSWERED])):
            for file in folder.glob(pattern):
                file.unlink()
        probe = folder / "merged.jsonl"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output={output} can't be written: {error.strerror or first_line(error)}") from error
    return keys


def _collect(folder: Path) -> list[int]:
    """Gather the answered rows of all earlier attempts in `answered.jsonl`, by time; their keys.

    Dropped: error lines (those rows are tried again), torn lines, and what a crash in here left twice.
    """
    keys: dict[int, None] = {}
    collected = folder / "collected.tmp"
    with ExitStack() as stack:
        files = sorted([*folder.glob("part-*.jsonl"), *folder.glob(ANSWERED)])
        earlier = [_whole_lines(stack.enter_context(open(file, "rb"))) for file in files]
        target = stack.enter_context(open(collected, "wb"))
        for line in heapq.merge(*earlier, key=_time):
            key = _key(line)
            if key is not None and key not in keys:
                keys[key] = None
                target.write(line)
        target.flush()
        os.fsync(target.fileno())
    os.replace(collected, folder / ANSWERED)
    return list(keys)


def _whole_lines(file: IO[bytes]) -> Iterator[bytes]:
    return (line for line in file if line.endswith(b"\n") and line.count(b"\t") == 3)


class PartWriter:
    """Appends the answers of one replica as they finish. Close it before rank 0 merges: on a network file system only
    then are the last rows sure to be seen elsewhere."""

    def __init__(self, output: str, dp_rank: int) -> None:
        self.file = open(_part(output, dp_rank), "ab")  # noqa: SIM115  (it lives as long as the run)

    def write(self, index: int, answer: str, key: int | None = None) -> None:
        """Append the answer line (without newline) of row `index`; `key` unless it is an error."""
        told = "-" if key is None else f"{key:016x}"
        self.file.write(f"{index}\t{time.time_ns()}\t{told}\t{answer}\n".encode())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def merge(output: str, dp: int, order: str = "input", placed: Mapping[int, int] | None = None) -> int:
    """Merge the parts of all replicas into the output, replacing it at once, and remove them. On rank 0, at the end.

    Args:
        output: the output file.
        dp: number of replicas, each of which has made its part, be it an empty one.
        order: `input`: by row; `completion`: as the answers finished, by the clocks of the replicas' leaders.
        placed: where the rows that earlier attempts answered stand in today's input, by key; others are left out.

    Returns:
        How many lines the output has. Memory besides `placed`: 8 bytes a row, and one answer.
    """
    folder = parts_folder(output)
    merged = folder / "merged.jsonl"
    files = [_part(output, rank) for rank in range(dp)]
    if (folder / ANSWERED).exists():
        _renumber(folder / ANSWERED, placed or {})
        files.append(folder / ANSWERED)
    lines = 0
    with ExitStack() as stack:
        parts = [stack.enter_context(open(file, "rb")) for file in files]
        target = stack.enter_context(open(merged, "wb"))
        for line in _by_row(parts) if order == "input" else heapq.merge(*parts, key=_time):
            target.write(line[line.rindex(b"\t") + 1 :])
            lines += 1
        target.flush()
        os.fsync(target.fileno())
    os.replace(merged, Path(output).resolve())
    for file in files:
        file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return lines


def _renumber(answered: Path, placed: Mapping[int, int]) -> None:
    """Give collected lines the numbers that their rows have in today's input; drop those of rows that left it."""
    renumbered = answered.with_suffix(".tmp")
    with open(answered, "rb") as source, open(renumbered, "wb") as target:
        for line in source:
            if (key := _key(line)) is not None and key in placed:
                target.write(b"%d%s" % (placed[key], line[line.index(b"\t") :]))
    os.replace(renumbered, answered)


def _by_row(parts: Sequence[IO[bytes]]) -> Iterator[bytes]:
    """Lines in the order of their rows, of which each has at most one."""
    places = array("q")  # of row i: offset * parts + part, or -1
    for number, part in enumerate(parts):
        offset = 0
        for line in part:
            row = int(line[: line.index(b"\t")])
            if row >= len(places):
                places.extend([-1] * (row + 1 - len(places)))
            places[row] = offset * len(parts) + number
            offset += len(line)
    for place in places:
        if place >= 0:
            part = parts[place % len(parts)]
            part.seek(place // len(parts))
            yield part.readline()


def _time(line: bytes) -> int:
    return int(line.split(b"\t", 2)[1])


def _key(line: bytes) -> int | None:
    key = line.split(b"\t", 3)[2]
    return None if key == b"-" else int(key, 16)


def _part(output: str, dp_rank: int) -> Path:
    return parts_folder(output) / f"part-{dp_rank}.jsonl"
