"""The format of journal files: who answered what, in lines that are only ever appended.

The first line is the header, a JSON object that says under "identity" what all answers depend on besides their rows.
Every other line is an entry: the row's number, the time in nanoseconds, its key and the answer, separated by tabs. The
key is a digest of the row's content in 16 hexadecimal digits, with a `!` before it if the answer is an error, or `-`
for a row that shares its custom_id with an earlier one. The answer is JSON, which holds no raw tab.

A killed run leaves at most a torn last line, a lost machine perhaps a hole of zeros: such lines are passed over.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import IO, Any, NamedTuple

BEFORE_ANSWER = re.compile(rb"(\d+)\t(\d+)\t(-|!?[0-9a-f]{16})\t")
Header = Mapping[str, Any]


class Entry(NamedTuple):
    row: int  # its number when it was answered
    time: int  # nanoseconds
    key: int | None
    failed: bool  # the answer is an error
    answer: bytes  # without newline


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
    """A journal that is read: all of it in order, or an entry by its place."""

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
