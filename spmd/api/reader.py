"""The input file as a source of jobs: every rank reads all of it, and builds the rows of its own replica only."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from typing import NamedTuple

from spmd.api.metadata import metadata_of
from spmd.api.rows import BadRow, Job, Row, RowParser, has_priority, load, number_name
from spmd.api.source import SKIPPED, Skipped, num_requests, skipped
from spmd.formats.kind import MAX_LINE_BYTES
from spmd.integers import digest64
from spmd.journal.key_table import KeyTable
from spmd.messages import first_line

BLOCK = 2**20  # bytes
NUMBER_NAME = b'"row-'
NAMED_LIKE_A_NUMBER = re.compile(rb'"custom_id"\s*:\s*"(row-(\d+)_*)"')


class Found(NamedTuple):
    """A row as it is met."""

    row: Row | BadRow
    line: bytes
    key: int | None
    place: int  # of its key among those of rows done before; -1: it is to be answered


class Reader:
    """A `Source` that holds one line at a time. Who answers which row is decided by whoever takes them.

    Rows are numbered from 0 without blank lines. All ranks agree on duplicates: the first row with a custom_id keeps
    it, whether or not it can be answered, and later ones are bad rows. This takes an 8-byte digest of each id in a
    set, about 90 bytes a row (18 MB for 200,000 rows). A row without custom_id is named by its number, `row-7`, with a
    `_` behind it for as long as another row of the input bears that name; so the names are looked for beforehand.

    Rows that an earlier run has done are passed over. A row's key is a digest of its content, its id, and of what
    else shapes the answer (`identity`), so a changed row, model or sampling is answered anew. A row whose custom_id is
    an earlier one's has no key and is never passed over.

    Args:
        path: the input file, one JSON object a line.
        parser: what turns lines into jobs; None: nobody will ask for them.
        done: keys of rows to pass over; each is set to its row's number when that is met.
        identity: what all answers depend on besides their rows: the model and the sampling defaults.
        size: bytes to read, so that all ranks end at the same row of a file that still grows; None: all there are.
        shard: [i, n]: rows whose number is i modulo n are the only ones to answer. Their ids, numbers and duplicates
            are those of the whole input.

    Raises:
        ValueError: the file can't be read or is empty. Raised here and not at the first row: the model loads between.
    """

    def __init__(
        self,
        path: str,
        parser: RowParser | None,
        done: KeyTable | None = None,
        identity: str = "",
        size: int | None = None,
        shard: Sequence[int] | None = None,
    ) -> None:
        self.path = path
        self.parser = parser
        self.done = KeyTable() if done is None else done
        self.identity = blake2b(identity.encode(), digest_size=16).digest()
        self.size = check_input(path) if size is None else size  # bytes
        self.shard, self.shards = shard or (0, 1)
        self.consumed = 0  # bytes
        self.waited = 0.0
        self.rows = 0  # so far, of all replicas and shards
        self.prioritized = 0  # of those to answer: rows with a priority
        self._names: set[str] | None = None  # see `taken_names`; None: nobody asked yet
        self._to_do = (found for found in self.read() if found.place < 0)

    def next_row(self, own: bool) -> Job | BadRow | Skipped | None:
        """Go on to the next row that is to be answered; build it if it is one's `own`. None: the end."""
        found = next(self._to_do, None)
        if found is None:
            return None
        if self.parser is None:
            assert not own
            return SKIPPED
        row = replace(self.parser.build(found.row) if isinstance(found.row, Row) else found.row, key=found.key)
        return row if own else skipped(num_requests(row))

    def unanswerable(self) -> int | None:
        """How many rows are left, if none can be answered, whatever the model; None as soon as a row perhaps can."""
        left = 0
        for found in self._to_do:
            if isinstance(found.row, Row):
                return None
            left += 1
        return left

    def bad_rows(self) -> Iterator[BadRow]:
        """Those of the rows that are left which can't be answered, whatever the model."""
        for found in self._to_do:
            if isinstance(found.row, BadRow):
                yield replace(found.row, key=found.key)

    def taken_names(self) -> set[str]:
        """Names of numbers that rows without custom_id can't have, looked for once: see `names_like_numbers`.

        It takes about a second a GB, and up to five where some id looks like a number's name.
        """
        if self._names is None:
            self._names = names_like_numbers(self.path, self.size)
        return self._names

    def read(self) -> Iterator[Found]:
        """All rows of the shard, those done before among them."""
        seen: set[int] = set()
        for line in self._lines():
            index = self.rows
            self.rows += 1
            row = load(line, index, self._name)
            custom_id = row.custom_id.encode()
            digest = digest64(custom_id)
            duplicate = digest in seen
            seen.add(digest)
            if index % self.shards != self.shard:
                continue
            if duplicate:
                if isinstance(row, Row):
                    message = f"custom_id {row.custom_id!r} is that of an earlier row too"
                    row = BadRow(index, row.custom_id, message, "duplicate_custom_id", metadata=metadata_of(row.data))
                yield Found(row, line, None, -1)
                continue
            key = digest64(custom_id + b"\0" + line.strip(), self.identity)
            place = self.done.find(key)
            if place >= 0:
                self.done.put(place, index)
            else:
                self.prioritized += isinstance(row, Row) and has_priority(row)
            yield Found(row, line, key, place)

    def _name(self, index: int) -> str:
        """Of a row without custom_id."""
        name, taken = number_name(index), self.taken_names()
        while name in taken:
            name += "_"
        return name

    def _lines(self) -> Iterator[bytes]:
        for line, size in _lines(self.path, self.size):
            self.consumed += size
            yield line


def _lines(path: str, size: int) -> Iterator[tuple[bytes, int]]:
    """Lines within the first `size` bytes that aren't blank, and how far each goes on from the one before, in bytes.

    Of one that is too long, enough to be found so.
    """
    consumed = before = 0
    with open(path, "rb") as file:
        while consumed < size and (line := file.readline(MAX_LINE_BYTES + 1)):
            consumed += len(line)
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
                consumed += len(rest)
            if not line.isspace():
                yield line, consumed - before
                before = consumed


def names_like_numbers(path: str, size: int) -> set[str]:
    """Those that rows bear as if they were called by their numbers, but for rows that have these numbers.

    A name that is written with escapes isn't seen; then the second row of that name is a duplicate.
    """
    names: set[str] = set()
    if not _holds(path, size, NUMBER_NAME):
        return names
    for index, (line, _) in enumerate(_lines(path, size)):
        if NUMBER_NAME in line:
            for name, number in NAMED_LIKE_A_NUMBER.findall(line):
                if int(number[:20]) != index:
                    names.add(name.decode())
    return names


def _holds(path: str, size: int, what: bytes) -> bool:
    """Whether the first `size` bytes of a file hold these."""
    end = b""
    with open(path, "rb") as file:
        while block := file.read(min(size, BLOCK)):
            if what in end + block:
                return True
            end = block[1 - len(what) :]
            size -= len(block)
    return False


def check_input(path: str) -> int:
    """Size of the input file in bytes.

    Raises:
        ValueError: it is missing, not readable or empty.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"input={path} can't be read: {error.strerror or first_line(error)}") from error
    if not size:
        raise ValueError(f"input={path} is empty")
    return size


def input_digest(path: str, size: int) -> str:
    """A digest of the first `size` bytes of a file; of all there are if it is shorter."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(min(size, BLOCK)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
