"""Answers are made and written beside the loop, which waits for the writer only where that is far behind."""

import json
import os
import signal
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spmd.api.answers import Finished, Head
from spmd.api.rows import BadRow
from spmd.journal.format import JournalFile
from spmd.journal.paths import Paths
from spmd.processes.outlet import MOST_KEPT, Outlet

HEADER = {"identity": {"model": "tiny"}}
TOKENS = array("i", range(500))


@contextmanager
def opened(output: Path) -> Iterator[Outlet]:
    """An outlet to the part of replica 0, without a tokenizer."""
    with Outlet() as outlet:
        outlet.load(None, None)
        outlet.open(str(output), 0, HEADER, "tiny")
        yield outlet


def send(outlet: Outlet, row: int) -> None:
    """An answer of some 3 KB with its token ids."""
    finished = Finished([1], TOKENS, True, False, "length", None, None, None)
    outlet.choice(row, 0, finished)
    outlet.answer(Head(row, f"row-{row}", "/v1/completions", row, 1, [[1]]))
    outlet.flush()


def written(output: Path) -> list[int]:
    """Rows in the part, in its order."""
    with open(Paths.of(str(output)).part(0), "rb") as file:
        return [entry.row for _, entry in JournalFile(file).entries()]


def test_the_loop_does_not_wait_for_a_writer_that_stands_still(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with opened(output) as outlet:
        os.kill(outlet._pid, signal.SIGSTOP)
        for row in range(1000):  # 2 MB, more than the line takes
            send(outlet, row)
        assert written(output) == []
        os.kill(outlet._pid, signal.SIGCONT)
        assert outlet.close() == 0
        assert written(output) == [*range(1000)]


def test_what_waits_to_be_written_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outlet.flush, "__defaults__", (100_000,))
    assert MOST_KEPT > 100_000
    with opened(tmp_path / "out.jsonl") as outlet:
        os.kill(outlet._pid, signal.SIGSTOP)
        resume = threading.Timer(0.5, os.kill, (outlet._pid, signal.SIGCONT))
        started = time.monotonic()
        resume.start()
        for row in range(1000):
            send(outlet, row)
            assert outlet._num_kept <= 100_000
        assert time.monotonic() - started > 0.4
        assert outlet.close() == 0


def test_what_was_sent_is_written_although_the_rank_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    rank = os.fork()
    if not rank:
        with opened(output) as outlet:
            os.kill(outlet._pid, signal.SIGSTOP)
            for row in range(30):  # the line takes them all
                send(outlet, row)
            os.kill(outlet._pid, signal.SIGCONT)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(rank, 0)
    deadline = time.monotonic() + 20
    while written(output) != [*range(30)] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert written(output) == [*range(30)]


def test_a_writer_that_is_killed_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"the process that writes the answers is gone; was it killed for memory\?"),
        opened(tmp_path / "out.jsonl") as outlet,
    ):
        os.kill(outlet._pid, signal.SIGKILL)
        for row in range(10_000):
            send(outlet, row)


def test_a_part_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl.parts").write_text("no folder")
    with pytest.raises(ValueError, match=r"part-0.jsonl can't be written"), opened(tmp_path / "out.jsonl"):
        pass


def test_a_choice_without_its_text_fails_its_row_and_an_error_takes_the_place_of_choices(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with opened(output) as outlet:
        choice = Finished([1], TOKENS, True, False, "stop", "END", None, None)  # a stop string that cut no text
        outlet.choice(0, 0, choice)
        outlet.answer(Head(0, "lost", "/v1/completions", None, 1, None))
        outlet.choice(1, 0, choice)
        outlet.error(BadRow(1, "bad", "no token"))
        send(outlet, 2)
        assert outlet.close() == 1
    with open(Paths.of(str(output)).part(0), "rb") as file:
        lines = [json.loads(entry.answer) for _, entry in JournalFile(file).entries()]
    assert [line["custom_id"] for line in lines] == ["lost", "bad", "row-2"]
    assert [line["error"] and line["error"]["code"] for line in lines] == ["server_error", "invalid_request", None]
    assert [line["response"]["status_code"] for line in lines] == [500, 400, 200]


def test_ranks_that_lead_no_replica_leave_without_a_part() -> None:
    with Outlet():
        pass
