"""The input file as a source of jobs: every rank reads all of it, and builds the rows of its own replica only."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b

from spmd.api.input_kind import check_kind
from spmd.api.rows import MAX_LINE_BYTES, BadRow, Job, Row, RowParser, load
from spmd.api.source import SKIPPED, Skipped
from spmd.integers import digest64
from spmd.journal.key_table import KeyTable
from spmd.messages import first_line

BLOCK = 2**20  # bytes


class Reader:
    """A `Source` that holds one line at a time. Who answers which row is decided by whoever takes them.

    Rows are numbered from 0 without blank lines. All ranks agree on duplicates: the first row with a custom_id keeps
    it, whether or not it can be answered, and later ones are bad rows. This takes an 8-byte digest of each id in a
    set, about 90 bytes a row (18 MB for 200,000 rows).

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
        self.rows = 0  # so far, of all replicas and shards
        self._to_do = self._read()

    def next_row(self, own: bool) -> Job | BadRow | Skipped | None:
        """Go on to the next row that is to be answered; build it if it is one's `own`. None: the end."""
        found = next(self._to_do, None)
        if found is None or not own:
            return found and SKIPPED
        row, key = found
        if isinstance(row, Row):
            assert self.parser is not None
            return replace(self.parser.build(row), key=key)
        return replace(row, key=key)

    def unanswerable(self) -> list[BadRow] | None:
        """All that is left, if none of it can be answered, whatever the model; None as soon as a row perhaps can."""
        left = []
        for row, key in self._to_do:
            if isinstance(row, Row):
                return None
            left.append(replace(row, key=key))
        return left

    def _read(self) -> Iterator[tuple[Row | BadRow, int | None]]:
        """Rows to answer, with their keys."""
        seen: set[int] = set()
        for line in self._lines():
            index = self.rows
            self.rows += 1
            row = load(line, index)
            custom_id = row.custom_id.encode()
            digest = digest64(custom_id)
            duplicate = digest in seen
            seen.add(digest)
            if index % self.shards != self.shard:
                continue
            if duplicate:
                if isinstance(row, Row):
                    message = f"custom_id {row.custom_id!r} is that of an earlier row too"
                    row = BadRow(index, row.custom_id, message, "duplicate_custom_id")
                yield row, None
                continue
            key = digest64(custom_id + b"\0" + line.strip(), self.identity)
            if not self.done.set(key, index):
                yield row, key

    def _lines(self) -> Iterator[bytes]:
        """Lines that are not blank; of one that is too long, enough to be found so."""
        with open(self.path, "rb") as file:
            while self.consumed < self.size and (line := file.readline(MAX_LINE_BYTES + 1)):
                self.consumed += len(line)
                rest = line
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                    self.consumed += len(rest)
                if not line.isspace():
                    yield line


def check_input(path: str) -> int:
    """Size of the input file in bytes.

    Raises:
        ValueError: it is missing, no file, not readable, empty, or of a kind that isn't read.
    """
    try:
        if os.path.isdir(path):
            raise ValueError(f"input={path} is a directory, not a file of one JSON object a line")
        found = os.stat(path)
        size, mode = found.st_size, found.st_mode
        if size == 0 and stat.S_ISREG(mode):
            raise ValueError(f"input={path} is empty")
        check_kind(path, mode)
    except OSError as error:
        raise ValueError(f"input={path} can't be read: {error.strerror or first_line(error)}") from error
    return size


def input_digest(path: str, size: int) -> str:
    """A digest of the first `size` bytes of a file; of all there are if it is shorter."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(min(size, BLOCK)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
