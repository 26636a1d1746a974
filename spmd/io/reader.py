"""The input file as a source of jobs: every rank reads all of it, and builds the rows of its own replica only."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b

from spmd.io.rows import MAX_LINE_BYTES, BadRow, Job, Row, RowParser, load
from spmd.io.source import SKIPPED, Skipped
from spmd.io.wording import first_line


class Reader:
    """A `Source` that holds one line at a time. Who answers which row is decided by whoever takes them.

    Rows are numbered from 0 without blank lines. All ranks agree on duplicates: the first row with a custom_id keeps
    it, whether or not it can be answered, and later ones are bad rows. This takes an 8-byte digest of each id in a
    set, about 90 bytes a row (18 MB for 200,000 rows).

    Rows that an earlier attempt answered are passed over. A row's key is a digest of its content, its id, and of what
    else shapes the answer (`identity`), so a changed row, model or sampling is answered anew.

    Args:
        path: the input file, one JSON object a line.
        parser: what turns lines into jobs.
        answered: keys of the rows to pass over; `placed` then tells where each of them stands.
        identity: what all answers depend on besides their rows: the model and the sampling defaults.
        size: bytes to read, so that all ranks end at the same row of a file that still grows; None: all there are.

    Raises:
        ValueError: the file can't be read or is empty. Raised here and not at the first row: the model loads between.
    """

    def __init__(
        self,
        path: str,
        parser: RowParser,
        answered: Iterable[int] = (),
        identity: str = "",
        size: int | None = None,
    ) -> None:
        self.path = path
        self.parser = parser
        self.answered = frozenset(answered)
        self.identity = blake2b(identity.encode(), digest_size=16).digest()
        self.placed: dict[int, int] = {}  # key of an answered row: its number
        self.size = check_input(path) if size is None else size  # bytes
        self.consumed = 0  # bytes
        self.rows = 0  # of all replicas so far
        self._unanswered = self._read()

    def take(self, own: bool) -> Job | BadRow | Skipped | None:
        """Go on to the next row that no earlier attempt answered; build it if it is one's `own`. None: the end."""
        found = next(self._unanswered, None)
        if found is None or not own:
            return found and SKIPPED
        row, key = found
        if isinstance(row, BadRow):
            return row
        built = self.parser.build(row)
        return replace(built, key=key) if isinstance(built, Job) else built

    def _read(self) -> Iterator[tuple[Row | BadRow, int]]:
        """Rows to answer, with their keys."""
        seen: set[int] = set()
        for line in self._lines():
            index = self.rows
            self.rows += 1
            row = load(line, index)
            custom_id = row.custom_id.encode()
            digest = _digest(custom_id)
            duplicate = digest in seen
            seen.add(digest)
            key = _digest(custom_id + b"\0" + line.strip(), self.identity)
            if key in self.answered and not duplicate:
                self.placed[key] = index
                continue
            if duplicate and not isinstance(row, BadRow):
                message = f"custom_id {row.custom_id!r} is that of an earlier row too"
                row = BadRow(index, row.custom_id, message, "duplicate_custom_id")
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


def _digest(content: bytes, salt: bytes = b"") -> int:
    return int.from_bytes(blake2b(content, digest_size=8, key=salt).digest(), "little")


def check_input(path: str) -> int:
    """Size of the input file in bytes.

    Raises:
        ValueError: it is missing, no file, not readable or empty.
    """
    try:
        if os.path.isdir(path):
            raise ValueError(f"input={path} is a directory, not a file of one JSON object a line")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"input={path} can't be read: {error.strerror or first_line(error)}") from error
    if size == 0:
        raise ValueError(f"input={path} is empty")
    return size
