"""Rows that a node's feeder makes: those that a reader would make, whoever builds them. No process outlives a rank."""

import json
import os
import shutil
import signal
import tempfile
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from spmd.api import reader as reader_module
from spmd.api.reader import Reader
from spmd.api.rows import BadRow, Job
from spmd.api.source import NOT_YET, SKIPPED
from spmd.config import SamplingConfig
from spmd.journal.key_table import KeyTable, pack
from spmd.processes import folder
from spmd.processes import packed as packed_form
from spmd.processes.feeder import BLOCK_MET, BLOCK_ROWS, Feeder, Intake
from spmd.processes.folder import AHEAD, abandoned
from spmd.processes.source import PreparedRows
from spmd.schedule.blocks import hash_blocks
from tests.support.broken_rows import MAX_MODEL_LEN, make_rows
from tests.support.checkpoints import write_checkpoint
from tests.support.jobs import alive
from tests.support.tiny_tokenizer import make_tokenizer

Row = Job | BadRow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    make_tokenizer(path)
    return write_checkpoint(path, "Qwen3ForCausalLM", vocab_size=269)


def intake(model: str, path: Path, builders: int = 2, done: bytes = b"", shard: list[int] | None = None) -> Intake:
    return Intake(
        input=str(path),
        done=done,
        identity="tested",
        size=path.stat().st_size,
        shard=shard,
        tokenizer=model,
        model=model,
        revision=None,
        now=datetime(2026, 1, 1),
        sampling=SamplingConfig(),
        max_model_len=MAX_MODEL_LEN,
        vocab_size=269,
        block_size=16,
        builders=builders,
    )


def begun(feeder: Feeder, of: Intake, ranks: int = 1) -> Path:
    """Its folder."""
    path = feeder.load(of, ranks)
    feeder.start(1000)
    return path


@contextmanager
def fed(of: Intake, ranks: int = 1) -> Iterator[tuple[Feeder, list[PreparedRows]]]:
    with Feeder() as feeder:
        path = begun(feeder, of, ranks)
        yield feeder, [PreparedRows(path, rank, ranks, of.reader()) for rank in range(ranks)]


def rest(rows: PreparedRows) -> list[Row]:
    """All that still come."""
    found: list[Row] = []
    while (row := rows.next_row(True)) is not None:
        if row is not NOT_YET:
            assert isinstance(row, Row)
            found.append(row)
    return found


def told(row: Row) -> object:
    """What of a row can be compared."""
    if isinstance(row, BadRow):
        return row
    prompts = [prompt.tokens for prompt in row.prompts]
    requests = [(each.index, each.choice, each.tokens(), each.params, each.priority) for each in row.requests]
    return row.index, row.custom_id, row.endpoint, prompts, row.return_token_ids, row.key, requests


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    path.write_bytes(b"".join(make_rows(900, 100)))
    return path


@pytest.mark.parametrize("builders", [1, 3])
def test_rows_are_those_of_a_reader_on_each_rank(model: str, broken: Path, builders: int) -> None:
    of = intake(model, broken, builders)
    reader = Reader(of.input, of.parser(), identity="tested")
    expected = []
    while (row := reader.next_row(True)) is not None:
        assert isinstance(row, Row)
        expected.append(told(row))
    with fed(of, ranks=2) as (_, ranks):
        for rows in ranks:
            assert list(map(told, rest(rows))) == expected
            assert (rows.rows, rows.consumed) == (reader.rows, reader.consumed) == (1000, reader.size)
            assert rows.next_row(True) is None, "the end is the end"


def test_rows_of_others_are_skipped_and_shards_keep_their_numbers(model: str, broken: Path) -> None:
    with fed(intake(model, broken, shard=[1, 3])) as (_, [rows]):
        assert rows.next_row(False) is SKIPPED
        assert [row.index for row in rest(rows)] == list(range(4, 1000, 3))


def test_rows_done_before_are_passed_over_a_bounded_number_at_a_time(model: str, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(b'{"custom_id": "%d", "prompt": "hello"}\n' % i for i in range(3 * BLOCK_MET)))
    of = intake(model, path)
    found = [each.key for each in of.reader().read()]
    assert None not in found
    left = {0, 3 * BLOCK_MET - 1}
    done = pack(array("Q", (key for place, key in enumerate(found) if key and place not in left)))
    with fed(intake(model, path, done=done)) as (_, [rows]):
        answers = [rows.next_row(True) for _ in range(4)]
    assert [getattr(row, "index", row) for row in answers] == [0, NOT_YET, 3 * BLOCK_MET - 1, None]
    table = KeyTable(done)
    assert rows.done.num_set == len(table) == 3 * BLOCK_MET - 2
    assert {found[number] for number in rows.done.values} == set(table.keys)


def many(folder: Path) -> Path:
    """A file of more rows than may be ahead."""
    path = folder / "in.jsonl"
    path.write_bytes(b'{"prompt": "hello"}\n' * BLOCK_ROWS * (AHEAD + 10))
    return path


def test_no_more_than_a_few_batches_are_ahead_of_the_slowest_rank(model: str, tmp_path: Path) -> None:
    with fed(intake(model, many(tmp_path)), ranks=2) as (_, [fast, slow]):
        for _ in range(AHEAD * BLOCK_ROWS):
            assert fast.next_row(False) is SKIPPED
        time.sleep(0.3)
        ready = {file.name for file in fast.folder.path.iterdir() if file.name.isdigit()}
        assert ready == {str(number) for number in range(AHEAD)}, "the other has taken none"
        for _ in range(AHEAD * BLOCK_ROWS):
            assert slow.next_row(False) is SKIPPED
        assert (len(rest(fast)), len(rest(slow))) == (BLOCK_ROWS * 10,) * 2, "both go on"


def test_a_row_travels_with_its_prompt_once(model: str, tmp_path: Path) -> None:
    parser = intake(model, Path(__file__)).parser()
    row = parser.parse(b'{"prompt": [%s], "max_tokens": 2, "n": 50}' % b",".join([b"5"] * 40), 0)
    assert isinstance(row, Job)
    packed = packed_form.pack(row)
    again = packed_form.unpack(packed)
    assert packed.count(row.prompts[0].tokens.tobytes()) == 1 and told(again) == told(row)
    assert isinstance(again, Job)
    assert len({id(request.output) for request in again.requests}) == 50, "each appends to its own"
    assert {id(request.prompt) for request in again.requests} == {id(again.prompts[0])}, "all share one prompt"
    assert len({id(request.params) for request in again.requests}) == 1, "and what is asked for"


def in_order(model: str, path: Path, most: list[int | None]) -> list[list[int]]:
    """Rows as two ranks get them, longest first with as many seats as rows; prompts grow shorter from row to row."""
    rows = [{"prompt": "a" * (40 - i)} | ({"max_tokens": tokens} if tokens else {}) for i, tokens in enumerate(most)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    of = intake(model, path)
    with Feeder() as feeder:
        folder = begun(feeder, of, 2)
        return [[row.index for row in rest(PreparedRows(folder, rank, 2, of.reader(), 20))] for rank in range(2)]


def test_rows_come_longest_first_on_every_rank(model: str, tmp_path: Path) -> None:
    assert in_order(model, tmp_path / "in.jsonl", [5, 5, 9, 2, 9, 7]) == [[0, 1, 2, 4, 5, 3]] * 2


@pytest.mark.parametrize("most", [[None] * 20, [None, 100_000] * 10, [7] * 20])
def test_rows_that_name_no_length_are_alike_whatever_their_prompts(
    model: str, tmp_path: Path, most: list[int | None]
) -> None:
    assert in_order(model, tmp_path / "in.jsonl", most) == [[*range(20)]] * 2


def test_hashes_of_blocks_come_with_the_rows(model: str, tmp_path: Path) -> None:
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"prompt": [*range(5, 45)]}))
    with fed(intake(model, rows)) as (_, [source]):
        [row] = rest(source)
    assert isinstance(row, Job)
    assert row.prompts[0].hashes == hash_blocks(row.prompts[0].tokens, 16) and len(row.prompts[0].hashes) == 2


@pytest.mark.parametrize("whole", [True, False])
def test_a_feeder_that_is_killed_is_told(
    model: str, tmp_path: Path, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.05)
    with Feeder() as feeder:
        of = intake(model, many(tmp_path))
        if whole:
            os.kill(feeder._pid, signal.SIGKILL)
            with pytest.raises(RuntimeError, match="was it killed for memory"):
                feeder.load(of, 1)
            return
        rows = PreparedRows(begun(feeder, of), 0, 1, of.reader())
        assert rows.next_row(True) is not None
        os.kill(feeder._pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="was it killed for memory"):
            rest(rows)


def test_what_a_builder_cannot_do_is_told(model: str, broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE", 0.05)
    of = intake(model + "/nowhere", broken)
    with Feeder() as feeder:
        rows = PreparedRows(begun(feeder, of), 0, 1, of.reader())
        with pytest.raises(RuntimeError, match="no tokenizer could be loaded"):
            rows.next_row(True)


def test_a_row_that_is_too_long_for_the_cache_is_bad(model: str, tmp_path: Path) -> None:
    """What that can hold is known only after all else was loaded."""
    (tmp_path / "in.jsonl").write_text('{"prompt": [5, 5, 5]}\n{"prompt": [5, 5]}\n')
    of = intake(model, tmp_path / "in.jsonl")
    with Feeder() as feeder:
        path = feeder.load(of, 1)
        time.sleep(0.2)
        assert not list(path.glob("[0-9]*"))
        feeder.start(3)
        bad, good = rest(PreparedRows(path, 0, 1, of.reader()))
    assert isinstance(bad, BadRow) and "3" in bad.message and isinstance(good, Job)


def test_names_are_looked_for_before_the_ranks_go_on(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first tick ranks would wait for that under a guard, for minutes where the input has a hundred GB."""
    find = reader_module.names_like_numbers

    def slow(path: str, size: int) -> set[str]:
        time.sleep(0.3)
        (tmp_path / "found").touch()
        return find(path, size)

    monkeypatch.setattr(reader_module, "names_like_numbers", slow)
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "hello"}\n{"custom_id": "row-0", "prompt": "hello"}\n')
    of = intake(model, path)
    with Feeder() as feeder:
        folder_of = begun(feeder, of)
        assert (tmp_path / "found").exists()
        (tmp_path / "found").unlink()
        assert [row.custom_id for row in rest(PreparedRows(folder_of, 0, 1, of.reader()))] == ["row-0_", "row-0"]
        assert not (tmp_path / "found").exists(), "looked for again"


def test_its_processes_end_with_the_rank_and_leave_nothing(model: str, broken: Path) -> None:
    pid = os.fork()
    if not pid:
        feeder = Feeder()
        path = begun(feeder, intake(model, broken))
        Path(broken.parent / "path").write_text(f"{feeder._pid} {path}")
        os._exit(0)  # as when it is killed
    os.waitpid(pid, 0)
    child, _, left = (broken.parent / "path").read_text().partition(" ")
    until = time.monotonic() + 20
    while (alive(int(child)) or Path(left).exists()) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(child)) and not Path(left).exists()


def test_what_a_killed_feeder_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder.Folder.make(1)
    assert not abandoned(path), "this process holds it"
    other = path.parent / f"{folder.PREFIX}of-{os.getpid()}"
    other.mkdir()
    os.utime(other, (0, 0))
    again = folder.Folder.make(1)
    assert not other.exists() and path.exists() and again.exists()
    for each in (path, again):
        shutil.rmtree(each)


def test_where_memory_has_no_room_rows_travel_by_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "ROOM", 2**62)
    path = folder.Folder.make(1)
    assert path.parent == Path(tempfile.gettempdir())
    shutil.rmtree(path)
