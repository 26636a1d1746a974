"""The format of journal files, which are only ever appended to, and of a finished output with its keys.

A journal's first line is the header, a JSON object that says under "identity" what all answers depend on besides their
rows. Every other line is an entry: the row's number, the time in nanoseconds, its key and the answer, separated by
tabs. The key is a digest of the row's content in 16 hexadecimal digits, with a `!` before it if the answer is an error,
or `-` for a row that shares its custom_id with an earlier one. The answer is JSON, which holds no raw tab. A killed run
leaves at most a torn last line, a lost machine perhaps a hole of zeros: such lines are passed over.

Beside a finished output lies a file of keys: a header as in a journal, then for each line of the output the key of its
row and a digest of the line, separated by a tab. A line is found by its content, so lines may have been deleted or
moved: a later run, which adds rows or has them in another order, reads the output as a source of answers.
"""

import json
import re
from array import array
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

from spmd.integers import digest64
from spmd.journal.key_table import KeyTable, pack

# Characters within JSON's strings at which some readers of lines, such as str.splitlines, begin another one.
SEPARATORS = [(character.encode(), f"\\u{ord(character):04x}".encode()) for character in "\u0085\u2028\u2029"]
BEFORE_ANSWER = re.compile(rb"(\d+)\t(\d+)\t(-|!?[0-9a-f]{16})\t")
Header = Mapping[str, Any]


class Entry(NamedTuple):
    row: int  # its number when it was answered
    time: int  # nanoseconds
    key: int | None
    failed: bool  # the answer is an error
    answer: bytes  # without newline


def one_line(answer: bytes) -> bytes:
    """JSON whose strings hold no character that ends a line to anybody, and mean the same."""
    for character, escape in SEPARATORS:
        answer = answer.replace(character, escape)
    return answer


def write_header(header: Header) -> bytes:
    return json.dumps(header, ensure_ascii=False).encode() + b"\n"


def read_header(file: IO[bytes]) -> dict[str, Any] | None:
    """The header of an opened journal; None if it is torn or something else."""
    file.seek(0)
    line = file.readline()
    try:
        header = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return header if isinstance(header, dict) and isinstance(header.get("identity"), dict) else None


def write_entry(entry: Entry) -> bytes:
    key = write_key(entry.key, entry.failed).encode()
    return b"%d\t%d\t%s\t%s\n" % (entry.row, entry.time, key, entry.answer)


def read_entry(line: bytes) -> Entry | None:
    """The entry of a line; None of a header, or if it isn't whole."""
    found = BEFORE_ANSWER.match(line)
    if found is None or not line.endswith(b"\n"):
        return None
    row, time, key = found.groups()
    answer = line[found.end() : -1]
    if not answer or b"\t" in answer or b"\0" in answer:
        return None
    return Entry(int(row), int(time), *read_key(key), answer)


def write_key(key: int | None, failed: bool) -> str:
    return "-" if key is None else f"{'!' * failed}{key:016x}"


def read_key(text: bytes) -> tuple[int | None, bool]:
    """A key and whether its row failed."""
    if text == b"-":
        return None, True
    failed = text.startswith(b"!")
    return int(text[failed:], 16), failed


class JournalFile:
    """A journal that is read: all of it in order, or an entry by its offset in bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file

    def entries(self) -> Iterator[tuple[int, Entry]]:
        """Whole entries with the offsets of their lines."""
        self.file.seek(0)
        offset = 0
        for line in self.file:
            if entry := read_entry(line):
                yield offset, entry
            offset += len(line)

    def read(self, offset: int) -> Entry:
        self.file.seek(offset)
        entry = read_entry(self.file.readline())
        assert entry is not None
        return entry


ANSWER, ERROR, KEYLESS = range(3)


def keys_line(entry: Entry) -> bytes:
    """What the file of keys says of an answer."""
    return f"{write_key(entry.key, entry.failed)}\t{digest64(entry.answer):016x}\n".encode()


class FinishedOutput:
    """A finished output that is read as if it were a journal, see `spmd.journal.format.JournalFile`.

    Args:
        output: the answers.
        keys: what the run that made them wrote beside them; read at once, from behind its header.
    """

    def __init__(self, output: IO[bytes], keys: IO[bytes]) -> None:
        self.file = output
        self.keys, self.kinds, digests = array("Q"), bytearray(), array("Q")
        for line in keys:
            key_text, digest = line.split(b"\t")
            key, failed = read_key(key_text)
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
        place = self.lines.find(digest64(answer))
        if place < 0:
            return None
        number = self.lines.values[place]
        kind = self.kinds[number]
        key = None if kind == KEYLESS else self.keys[number]
        return Entry(row=0, time=offset, key=key, failed=kind != ANSWER, answer=answer)  # older than any clock's time
