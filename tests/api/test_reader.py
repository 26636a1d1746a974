import json
import tracemalloc
from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import pytest

from spmd.api import rows
from spmd.api.reader import Reader, input_digest, names_like_numbers
from spmd.api.rows import BadRow, Job, RowParser
from spmd.api.source import SKIPPED, NotYet, Skipped
from spmd.config import SamplingConfig
from spmd.journal.key_table import KeyTable, pack
from tests.support.broken_rows import MAX_MODEL_LEN, make_rows
from tests.support.tiny_tokenizer import make_tokenizer

Result = Job | BadRow
PARSER = RowParser(make_tokenizer(), {}, SamplingConfig(), MAX_MODEL_LEN, 1000, 269)


def write(path: Path, lines: Iterable[bytes]) -> str:
    path.write_bytes(b"".join(lines))
    return str(path)


def rows_of(reader: Reader, dp: int = 1, dp_rank: int = 0) -> list[Result]:
    """The rows of one of `dp` replicas, which are dealt out in turn."""
    taken: list[Result | Skipped | NotYet | None] = [reader.next_row(dp_rank == 0)]
    while taken[-1] is not None:
        taken.append(reader.next_row(len(taken) % dp == dp_rank))
    assert all((row is SKIPPED) == (turn % dp != dp_rank) for turn, row in enumerate(taken[:-1]))
    return [row for row in taken if isinstance(row, Result)]


def read(path: str, dp: int = 1) -> list[Result]:
    """Results of all replicas in the order of their rows."""
    results = [result for dp_rank in range(dp) for result in rows_of(Reader(path, PARSER), dp, dp_rank)]
    return sorted(results, key=lambda result: result.index)


def describe(results: Iterable[Result]) -> list[tuple[object, ...]]:
    return [(type(result), result.index, result.custom_id, getattr(result, "message", None)) for result in results]


@pytest.mark.parametrize("dp", [2, 3])
def test_replicas_together_read_what_one_reads(tmp_path: Path, dp: int) -> None:
    path = write(tmp_path / "in.jsonl", make_rows(300, 60))
    assert describe(read(path, dp)) == describe(read(path))
    assert [result.index for result in rows_of(Reader(path, PARSER), dp, 1)] == list(range(1, 360, dp))


def test_a_thousand_rows_with_a_hundred_broken_ones(tmp_path: Path) -> None:
    results = read(write(tmp_path / "in.jsonl", make_rows(900, 100)))
    assert [result.index for result in results] == list(range(1000))
    assert sum(isinstance(result, Job) for result in results) == 900
    bad = [result for result in results if isinstance(result, BadRow)]
    assert len(bad) == 100 and len({result.message for result in bad}) >= 60
    assert {result.code for result in bad} == {
        *("invalid_json", "invalid_request", "context_length_exceeded", "duplicate_custom_id")
    }


def test_duplicates_are_found_across_replicas_and_the_first_wins(tmp_path: Path) -> None:
    row = b'{"custom_id": "a", "prompt": "x"}\n'
    named_as_generated = b'{"custom_id": "row-4", "prompt": "x"}\n'
    broken = b'{"custom_id": "b", "prompt": 5}\n'
    path = write(tmp_path / "in.jsonl", [row, row, named_as_generated, row, b'{"prompt": "x"}\n', broken, broken])
    for dp in (1, 2, 3):
        results = read(path, dp)
        codes = [getattr(result, "code", "") for result in results]
        duplicate = "duplicate_custom_id"
        assert codes == ["", duplicate, "", duplicate, "", "invalid_request", duplicate]
        assert isinstance(results[1], BadRow) and "'a'" in results[1].message


def test_blank_lines_count_nowhere_and_the_last_newline_may_be_missing(tmp_path: Path) -> None:
    lines = [b"\n", b'{"prompt": "x"}\r\n', b"  \t\n", b"\r\n", b'{"prompt": "y"}']
    reader = Reader(write(tmp_path / "in.jsonl", lines), PARSER)
    assert [(result.index, result.custom_id) for result in rows_of(reader)] == [(0, "row-0"), (1, "row-1")]
    assert (reader.rows, reader.consumed) == (2, reader.size)


def test_it_streams(tmp_path: Path) -> None:
    reader = Reader(write(tmp_path / "in.jsonl", [b'{"prompt": "hello"}\n'] * 1000), PARSER)
    assert isinstance(reader.next_row(True), Job)
    assert reader.rows == 1 and reader.consumed == reader.size // 1000


def test_a_line_too_large_to_hold_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr("spmd.api.reader.MAX_LINE_BYTES", 100)
    good, exact = b'{"prompt": "x"}\n', b'{"prompt": "x"}'.ljust(99) + b"\n"
    for length in (99, 100, 101, 202, 1000):
        lines = [good, b"a" * length + b"\n", good, exact, b"a" * length]
        reader = Reader(write(tmp_path / "in.jsonl", lines), PARSER)
        assert [type(result) for result in rows_of(reader)] == [Job, BadRow, Job, Job, BadRow], length
        assert reader.consumed == reader.size


def test_memory_is_a_digest_a_row(tmp_path: Path) -> None:
    lines = [json.dumps({"custom_id": f"{n:0200}"}).encode() + b"\n" for n in range(20000)]
    path = write(tmp_path / "in.jsonl", lines)
    reader = Reader(path, PARSER)
    tracemalloc.start()
    while reader.next_row(False):
        pass
    assert reader.rows == 20000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20000 * 200  # the set holds two tables while it grows


def test_inputs_that_cannot_be_read_fail_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input=.*missing.* can't be read: No such file"):
        Reader(str(tmp_path / "missing"), PARSER)
    with pytest.raises(ValueError, match="Is a directory"):
        Reader(str(tmp_path), PARSER)
    with pytest.raises(ValueError, match="is empty"):
        Reader(write(tmp_path / "empty", []), PARSER)


def test_an_input_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "in.jsonl", [b"{}\n"])

    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", deny)  # root, who may run the tests, is never denied
    with pytest.raises(ValueError, match="can't be read: Permission denied"):
        Reader(path, PARSER)


def table(keys: Sequence[int]) -> KeyTable:
    return KeyTable(pack(array("Q", keys)))


def test_rows_that_are_done_are_passed_over_on_every_replica(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [b'{"custom_id": "%d", "prompt": "hello"}\n' % row for row in range(20)])
    keys = {job.index: job.key for job in read(path) if job.key is not None}
    done = [keys[row] for row in range(0, 20, 2)]  # all of what replica 0 would have had
    readers = [Reader(path, PARSER, table(done)) for _ in range(2)]
    dealt = [rows_of(reader, 2, dp_rank) for dp_rank, reader in enumerate(readers)]
    assert [[job.index for job in jobs] for jobs in dealt] == [[1, 5, 9, 13, 17], [3, 7, 11, 15, 19]]
    for reader in readers:
        assert [reader.done.values[reader.done.find(key)] for key in done] == list(range(0, 20, 2))
    assert not set(done) & {job.key for job in rows_of(Reader(path, PARSER, table(done), "another model"))}


def test_bad_rows_have_keys_too_but_not_those_that_repeat_an_id(tmp_path: Path) -> None:
    row, bad = b'{"custom_id": "a", "prompt": "x"}\n', b'{"custom_id": "b", "prompt": 5}\n'
    path = write(tmp_path / "in.jsonl", [row, row, bad, bad, b"{\n", b'{"prompt": "too long' + b" x" * 99 + b'"}\n'])
    keys = [result.key for result in read(path)]
    assert [key is None for key in keys] == [False, True, False, True, False, False]
    known = [key for key in keys if key is not None]
    assert len(set(known)) == 4
    left = rows_of(Reader(path, PARSER, table(known)))
    assert [(result.index, result.key) for result in left] == [(1, None), (3, None)]


def test_shards_together_read_the_whole_with_its_numbers_ids_and_duplicates(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", make_rows(200, 50))
    whole, shards = read(path), [rows_of(Reader(path, PARSER, shard=[number, 3])) for number in range(3)]
    assert [result.index for result in shards[1]] == list(range(1, 250, 3))
    together = sorted((result for shard in shards for result in shard), key=lambda result: result.index)
    assert describe(together) == describe(whole)
    assert [result.key for result in together] == [result.key for result in whole]
    assert any(getattr(result, "code", "") == "duplicate_custom_id" for result in whole)
    assert [rows_of(Reader(path, PARSER, shard=[number, 300])) == [] for number in (249, 250)] == [False, True]


def test_digest_of_the_beginning_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.api.reader.BLOCK", 10)
    content = b"".join(b"%d\n" % row for row in range(50))
    path = write(tmp_path / "in.jsonl", [content])
    for size in (0, 1, 2, 9, 10, 11, 20, len(content), len(content) + 5):
        assert input_digest(path, size) == blake2b(content[:size], digest_size=16).hexdigest()


def test_rows_appended_during_the_run_are_left_for_the_next(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [b'{"prompt": "hello"}\n'] * 3)
    reader = Reader(path, PARSER)
    with open(path, "ab") as file:
        file.write(b'{"prompt": "late"}\n')
    assert len(rows_of(reader)) == 3


# -- rows without custom_id -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        ([b'{"prompt": "a"}', b'{"custom_id": "row-0", "prompt": "b"}'], ["row-0_", "row-0"]),
        ([b'{"custom_id":"row-1","prompt": "a"}', b'{"prompt": "b"}'], ["row-1", "row-1_"]),
        ([b'{"prompt": "a"}', b'{"custom_id": "row-0_", "prompt": "b"}'], ["row-0", "row-0_"]),
        (
            [b'{"prompt": "a"}', b'{"custom_id": "row-0_", "prompt": "b"}', b'{"prompt": "c", "custom_id" : "row-0"}'],
            ["row-0__", "row-0_", "row-0"],
        ),
        ([b'{"custom_id": "row-0", "prompt": "a"}', b'{"prompt": "b"}'], ["row-0", "row-1"]),
        ([b'{"prompt": "a"}', b"no JSON", b'{"custom_id": "row-1", "prompt": "b"}'], ["row-0", "row-1_", "row-1"]),
        ([b'{"prompt": "\\"custom_id\\": \\"row-1\\""}', b'{"prompt": "b"}'], ["row-0", "row-1"]),
        ([b"", b'{"prompt": "a"}', b"", b'{"custom_id": "row-0", "prompt": "b"}'], ["row-0_", "row-0"]),
        (
            [b'{"custom_id": "row-' + b"9" * 5000 + b'", "prompt": "a"}', b'{"prompt": "b"}'],
            ["row-" + "9" * 5000, "row-1"],
        ),
    ],
)
def test_a_row_without_custom_id_takes_nobodys_name(tmp_path: Path, lines: list[bytes], names: list[str]) -> None:
    path = write(tmp_path / "in.jsonl", [line + b"\n" for line in lines])
    for dp in (1, 2):
        results = read(path, dp)
        assert [result.custom_id for result in results] == names
        assert not [result for result in results if getattr(result, "code", "") == "duplicate_custom_id"]


def test_names_are_looked_for_where_a_row_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.api.reader.names_like_numbers", lambda *_: 1 / 0)
    path = write(tmp_path / "in.jsonl", [b'{"custom_id": "row-%d", "prompt": "a"}\n' % (row + 1) for row in range(9)])
    assert [result.custom_id for result in read(path)] == [f"row-{row + 1}" for row in range(9)]


def test_a_name_is_found_wherever_blocks_of_bytes_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.api.reader.BLOCK", 16)
    for before in range(20):
        lines = [b'{"prompt": "%s"}\n' % (b"a" * before), b'{"custom_id": "row-0"}\n']
        path = write(tmp_path / "in.jsonl", lines)
        assert names_like_numbers(path, sum(map(len, lines))) == {"row-0"}
        assert names_like_numbers(path, len(lines[0])) == set(), "no further than rows are read"


def test_rows_with_a_priority_are_counted(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "a", "priority": 1}\n',
        b'{"prompt": "b", "priority": 0}\n',
        b'{"body": {"prompt": "c", "priority": -5}}\n',
        b'{"prompt": "d"}\n',
        b"no JSON\n",
        b'{"prompt": "e", "priority": "high"}\n',
    ]
    reader = Reader(write(tmp_path / "in.jsonl", lines), PARSER)
    assert len(rows_of(reader)) == 6 and reader.prioritized == 3
