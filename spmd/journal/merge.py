"""From all answers to the next output: every row's newest one, in the order that was asked for."""

import os
from array import array
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from spmd.journal.format import Entry, Header, keys_line, write_entry, write_header
from spmd.journal.key_table import KeyTable
from spmd.journal.paths import Paths


class Source(Protocol):
    """A file of answers; `spmd.journal.format.JournalFile` or `spmd.journal.format.FinishedOutput`."""

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """All answers with their offsets in the file."""

    def read(self, offset: int) -> Entry:
        """The answer at an offset."""


class Merge:
    """Finds the newest answer of every row. Memory: 16 bytes a row and 8 a row that left the input, and one answer.

    Args:
        earlier: answers of earlier runs, oldest first; a row of today's input is found by its key.
        parts: those of this run, by the rows' numbers.
        rows: where in today's input each key of the earlier answers stands, -1: nowhere.
    """

    def __init__(self, earlier: Sequence[Source], parts: Sequence[Source], rows: KeyTable) -> None:
        self.sources = [*earlier, *parts]
        self.of_rows, self.times = array("q"), array("q")  # paths of answers, and when they were given, by row
        self.unused = array("q", [-1]) * len(rows)  # paths of answers to rows that aren't in the input, by key
        for number, source in enumerate(self.sources):
            for offset, entry in source.entries():
                place = offset * len(self.sources) + number
                if number >= len(earlier):
                    self._put(entry.row, place, entry.time)
                elif (at := rows.find(entry.key)) >= 0 and rows.values[at] >= 0:
                    self._put(rows.values[at], place, entry.time)
                elif at >= 0:
                    self.unused[at] = place
        self.num_rows = sum(place >= 0 for place in self.of_rows)
        self.num_unused = sum(place >= 0 for place in self.unused)

    def write(self, paths: Paths, header: Header, by_time: bool = False) -> None:
        """Write `paths.merged` and what belongs to it, in input order or as the answers were given.

        Raises:
            OSError: there is no room for it, say.
        """
        order = np.argsort(np.frombuffer(self.times, np.int64), kind="stable") if by_time else range(len(self.of_rows))
        with open(paths.merged, "wb") as merged, open(paths.merged_keys, "wb") as keys:
            keys.write(write_header(header))
            for row in order:
                if self.of_rows[row] >= 0:
                    entry = self._read(self.of_rows[row])
                    merged.write(entry.answer + b"\n")
                    keys.write(keys_line(entry))
            for file in (merged, keys):
                file.flush()
                os.fsync(file.fileno())
        with open(paths.merged_unused, "wb") as unused:
            unused.write(write_header(header))
            unused.writelines(write_entry(self._read(place)) for place in self.unused if place >= 0)
            unused.flush()
            os.fsync(unused.fileno())

    def _put(self, row: int, place: int, time: int) -> None:
        if row >= len(self.of_rows):
            more = row + 1 - len(self.of_rows)
            self.of_rows.extend([-1] * more)
            self.times.extend([0] * more)
        self.of_rows[row], self.times[row] = place, time

    def _read(self, place: int) -> Entry:
        return self.sources[place % len(self.sources)].read(place // len(self.sources))
