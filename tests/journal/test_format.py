import io
import random

from spmd.journal.format import Entry, JournalFile, read_entry, read_header, write_entry, write_header
from tests.support.attempts import HEADER, answer


def entries(count: int) -> list[Entry]:
    keys = [None if row % 7 == 3 else row * 0x1234567 for row in range(count)]
    return [
        Entry(row, 10**18 + row, key, row % 5 == 0 or key is None, answer(row).encode()) for row, key in enumerate(keys)
    ]


def test_what_is_written_is_read_with_the_places_of_its_lines() -> None:
    written = entries(30)
    file = io.BytesIO(write_header(HEADER) + b"".join(map(write_entry, written)))
    assert read_header(file) == HEADER
    journal = JournalFile(file)
    read = list(journal.entries())
    assert [entry for _, entry in read] == written
    assert [journal.read(offset) for offset, _ in reversed(read)] == written[::-1]


def test_a_journal_torn_anywhere_keeps_all_whole_lines_and_nothing_else() -> None:
    written = entries(12)
    lines = [write_header(HEADER), *map(write_entry, written)]
    whole = b"".join(lines)
    ends = [len(b"".join(lines[: number + 1])) for number in range(len(lines))]
    for cut in range(len(whole)):
        file = io.BytesIO(whole[:cut])
        kept = sum(end <= cut for end in ends[1:])
        assert [entry for _, entry in JournalFile(file).entries()] == written[:kept]
        assert (read_header(file) is not None) == (cut >= ends[0])


def test_holes_and_lines_of_others_are_passed_over() -> None:
    rng = random.Random(0)
    lines = [write_entry(entry) for entry in entries(20)]
    file = bytearray(b"".join(lines))
    begin = rng.randrange(len(lines[0]), len(file) - 300)
    file[begin : begin + 200] = bytes(200)  # what a lost machine leaves of blocks that never reached the disk
    read = [entry for _, entry in JournalFile(io.BytesIO(bytes(file))).entries()]
    assert set(read) < set(entries(20)) and len(read) >= 15
    good = lines[5]
    for bad in (good[:-1], b"x" + good, good.replace(b"\t", b" ", 1), good[:-1] + b"\t\n", b"\n", b"", b"{}\n"):
        assert read_entry(bad) is None
    assert [read_header(io.BytesIO(text)) for text in (b"[]\n", b"{}\n", b'{"identity": 5}\n', b"")] == [None] * 4
