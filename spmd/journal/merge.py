"""From all answers to the next output: every row's newest one, in the order that was asked for.

Rank 0 does it alone, after all leaders have closed their parts: nobody writes to what is read here.
"""

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from spmd.journal.format import Entry, Header, keys_line, one_line, write_entry, write_header
from spmd.journal.key_table import KeyTable
from spmd.journal.paths import Paths


class Source(Protocol):
    """A file of answers; `spmd.journal.format.JournalFile` or `spmd.journal.format.FinishedOutput`."""

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """All answers with their offsets in the file."""

    def read(self, offset: int) -> Entry:
        """The answer at an offset."""


class Merge:
    """Finds the newest answer of every row: of several that a row has, that of the latest source.

    Memory: 16 bytes a row, 8 a row that left the input or failed, and one answer.

    Args:
        earlier: answers of earlier runs, oldest first; a row of today's input is found by its key.
        parts: those of this run, by the rows' numbers.
        rows: where in today's input each key of the earlier answers stands, -1: nowhere.
    """

    def __init__(self, earlier: Sequence[Source], parts: Sequence[Source], rows: KeyTable) -> None:
        self.sources = [*earlier, *parts]
        self.locations, self.times = array("q"), array("q")  # by row: its answer's location, and when it was given
        self.unused = array("q", [-1]) * len(rows)  # by key: locations of answers to rows that aren't in the input
        for number, source in enumerate(self.sources):
            for offset, entry in source.entries():
                location = offset * len(self.sources) + number
                if number >= len(earlier):
                    self._put(entry.row, location, entry.time)
                elif (at := rows.find(entry.key)) >= 0 and rows.values[at] >= 0:
                    self._put(rows.values[at], location, entry.time)
                elif at >= 0:
                    self.unused[at] = location
        self.failed = array("q")  # locations of errors in the output, once it is written
        self.num_rows = sum(location >= 0 for location in self.locations)
        self.num_unused = sum(location >= 0 for location in self.unused)

    def write(self, paths: Paths, header: Header, by_time: bool = False) -> None:
        """Write `paths.merged` and what belongs to it, in input order or as the answers were given.

        All of it is on the disk when this returns. `merged` is made before `merged_keys`: the latter without the
        former is the mark of a replacement that has happened, see `Journal`.

        Raises:
            OSError: the disk is full, say.
        """
        times = np.frombuffer(self.times, np.int64)
        order = np.argsort(times, kind="stable") if by_time else range(len(self.locations))
        with open(paths.merged, "wb") as merged, open(paths.merged_keys, "wb") as keys:
            keys.write(write_header(header))
            for row in order:
                if self.locations[row] >= 0:
                    entry = self._read(self.locations[row])
                    merged.write(entry.answer + b"\n")
                    keys.write(keys_line(entry))
                    if entry.failed:
                        self.failed.append(self.locations[row])
            for file in (merged, keys):
                file.flush()
                os.fsync(file.fileno())
        with open(paths.merged_unused, "wb") as unused:
            unused.write(write_header(header))
            unused.writelines(write_entry(self._read(location)) for location in self.unused if location >= 0)
            unused.flush()
            os.fsync(unused.fileno())

    def write_errors(self, path: Path) -> None:
        """Replace a file by those answers that are errors, in the order of the output, which has been written before.

        Raises:
            OSError: the disk is full, say; the file is as it was.
        """
        anew = path.with_name(path.name + ".new")
        try:
            with open(anew, "wb") as file:
                file.writelines(self._read(location).answer + b"\n" for location in self.failed)
                file.flush()
                os.fsync(file.fileno())
            os.replace(anew, path)
        except OSError:
            anew.unlink(missing_ok=True)
            raise

    def _put(self, row: int, location: int, time: int) -> None:
        """`location`: the offset in the source, and which source that is, as one number."""
        if row >= len(self.locations):
            more = row + 1 - len(self.locations)
            self.locations.extend([-1] * more)
            self.times.extend([0] * more)
        self.locations[row], self.times[row] = location, time

    def _read(self, location: int) -> Entry:
        entry = self.sources[location % len(self.sources)].read(location // len(self.sources))
        return entry._replace(answer=one_line(entry.answer))  # older versions wrote all characters as they are
