"""The output: each replica appends answers to a part file of its own, and rank 0 merges the parts at the end.

Parts lie in `<output>.parts/part-<dp_rank>.jsonl`. A line is the row's number, the time in nanoseconds and the answer,
separated by tabs. The answer is JSON, which holds no raw tab: it stands behind the last one, and fields can be added
before it. Every row is flushed, so `tail -f` shows it at once and a killed run loses at most a torn last line.
"""

import heapq
import os
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from spmd.io.wording import first_line


def parts_folder(output: str) -> Path:
    """Where the parts of an output lie until they are merged: beside it, through symbolic links."""
    path = Path(output).resolve()
    return path.with_name(path.name + ".parts")


def prepare_output(output: str, input: str | None = None) -> None:
    """Make the parts folder, cleared of an earlier run's parts. On rank 0, before others write.

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
        for part in folder.glob("part-*.jsonl"):
            part.unlink()
        probe = folder / "merged.jsonl"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output={output} can't be written: {error.strerror or first_line(error)}") from error


class PartWriter:
    """Appends the answers of one replica as they finish. Close it before rank 0 merges: on a network file system only
    then are the last rows sure to be seen elsewhere."""

    def __init__(self, output: str, dp_rank: int) -> None:
        self.file = open(_part(output, dp_rank), "ab")  # noqa: SIM115  (it lives as long as the run)

    def write(self, index: int, answer: str) -> None:
        """Append the answer line (without newline) of row `index`."""
        self.file.write(f"{index}\t{time.time_ns()}\t{answer}\n".encode())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def merge(output: str, dp: int, order: str = "input") -> int:
    """Merge the parts of all replicas into the output, replacing it at once, and remove them. On rank 0, at the end.

    Args:
        output: the output file.
        dp: number of replicas, each of which has made its part, be it an empty one.
        order: `input`: by row; `completion`: as the answers finished, by the clocks of the replicas' leaders.

    Returns:
        How many lines the output has. Memory: 8 bytes a row, and one answer.
    """
    folder = parts_folder(output)
    merged = folder / "merged.jsonl"
    lines = 0
    with ExitStack() as stack:
        parts = [stack.enter_context(open(_part(output, rank), "rb")) for rank in range(dp)]
        target = stack.enter_context(open(merged, "wb"))
        for line in _by_row(parts) if order == "input" else heapq.merge(*parts, key=_time):
            target.write(line[line.rindex(b"\t") + 1 :])
            lines += 1
        target.flush()
        os.fsync(target.fileno())
    os.replace(merged, Path(output).resolve())
    for rank in range(dp):
        _part(output, rank).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return lines


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


def _part(output: str, dp_rank: int) -> Path:
    return parts_folder(output) / f"part-{dp_rank}.jsonl"
