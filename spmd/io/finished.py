"""A finished output as a source of answers for a later run, which adds rows or has them in another order.

Beside an output lies a file of keys: a header as in a journal file, then for each line of the output the key of its row
and a digest of the line, separated by a tab. A line is found by its content, so lines may have been deleted or moved.
"""

from array import array
from collections.abc import Iterator
from hashlib import blake2b
from typing import IO

from spmd.io.entry import Entry, read_key, write_key
from spmd.io.keys import KeyTable, pack

ANSWER, ERROR, KEYLESS = range(3)


def keys_line(entry: Entry) -> bytes:
    """What the file of keys says of an answer."""
    return f"{write_key(entry.key, entry.failed)}\t{_digest(entry.answer):016x}\n".encode()


class FinishedOutput:
    """A finished output that is read as if it were a journal, see `spmd.io.entry.JournalFile`.

    Args:
        output: the answers.
        keys: what the run that made them wrote beside them; read at once, from behind its header.
    """

    def __init__(self, output: IO[bytes], keys: IO[bytes]) -> None:
        self.file = output
        self.keys, self.kinds, digests = array("Q"), bytearray(), array("Q")
        for line in keys:
            told, digest = line.split(b"\t")
            key, failed = read_key(told)
            self.keys.append(key or 0)
            self.kinds.append(KEYLESS if key is None else ERROR if failed else ANSWER)
            digests.append(int(digest, 16))
        self.lines = KeyTable(pack(digests))
        for number, of_line in enumerate(digests):
            self.lines.set(of_line, number)

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """Its answers with the offsets of their lines.

        Raises:
            ValueError: at the end, if there were lines that no run wrote.
        """
        self.file.seek(0)
        offset = foreign = first = 0
        for number, line in enumerate(self.file, 1):
            if entry := self._entry(line, offset):
                yield offset, entry
            elif not line.isspace():
                foreign, first = foreign + 1, first or number
            offset += len(line)
        if foreign:
            raise ValueError(f"{foreign:,} of its lines aren't as a run wrote them, the first is line {first:,}")

    def read(self, offset: int) -> Entry:
        self.file.seek(offset)
        entry = self._entry(self.file.readline(), offset)
        assert entry is not None
        return entry

    def _entry(self, line: bytes, offset: int) -> Entry | None:
        answer = line.rstrip(b"\r\n")
        place = self.lines.find(_digest(answer))
        if place < 0:
            return None
        number = self.lines.values[place]
        kind = self.kinds[number]
        key = None if kind == KEYLESS else self.keys[number]
        return Entry(row=0, time=offset, key=key, failed=kind != ANSWER, answer=answer)  # older than any clock's time


def _digest(answer: bytes) -> int:
    return int.from_bytes(blake2b(answer, digest_size=8).digest(), "little")
