import fcntl
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spmd.journal.journal import Journal
from spmd.journal.key_table import KeyTable
from spmd.journal.paths import Paths, shard_output
from spmd.journal.writer import PartWriter
from tests.support.attempts import HEADER, answer, attempt, enlarge, names, rows_of, small_disk

OTHER = HEADER | {"identity": {"weights": "b", "sampling.seed": 0, "sampling.top_k": 5}, "model.path": "/models/b"}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def parts(output: Path) -> list[Path]:
    return Paths.of(str(output)).parts()


# -- attempts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dp", [1, 3])
def test_answers_stand_in_the_order_of_the_input_or_of_time(
    output: Path, dp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**18, 10**18 + 1000))
    monkeypatch.setattr("time.time_ns", lambda: next(ticks))
    rows = list(range(50))
    random.Random(0).shuffle(rows)
    attempt(output, rows[::-1], dp=dp, cut=20)
    attempt(output, rows, dp=dp)
    assert rows_of(output) == rows
    assert names(output.parent) == ["out.jsonl", "out.jsonl.journal"]
    (output.parent / "by_time").mkdir()
    by_time = output.parent / "by_time" / "out.jsonl"
    attempt(by_time, rows[::-1], dp=dp, cut=20)
    attempt(by_time, rows, dp=dp, by_time=True)
    assert rows_of(by_time) == rows[:29:-1] + rows[:30]
    attempt(by_time, sorted([*rows, 99]), by_time=True)
    assert rows_of(by_time) == [*rows[:29:-1], *rows[:30], 99]


def test_however_often_a_run_is_cut_and_torn_no_whole_answer_is_lost_and_none_given_twice(output: Path) -> None:
    """Attempts with other topologies, at inputs in other orders; the last one's part is torn anywhere after each."""
    rng = random.Random(3)
    for _ in range(12):
        rows, dp = list(range(40)), 1
        safe: set[int] = set()
        while True:
            rng.shuffle(rows)
            last = rng.random() < 0.2
            answered = attempt(output, rows, dp=rng.randint(1, 3), cut=None if last else rng.randrange(12))
            assert not safe & set(answered)
            if last:
                break
            safe |= set(answered)
            for part in parts(output):
                whole = part.read_bytes()
                torn = whole[: rng.randrange(len(whole) + 1)]
                lost = whole[torn.rfind(b"\n") + 1 :].decode().split("\n")[:-1]
                safe -= {int(line.split("\t")[2], 16) for line in lost if "\t" in line}
                part.write_bytes(torn)
        assert rows_of(output) == rows
        attempt(output, [], resume="fresh")
        assert rows_of(output) == [] and dp == 1


def test_answers_of_a_cut_run_are_kept_once(output: Path) -> None:
    for _ in range(5):
        attempt(output, range(20), cut=3)
    answered = Paths.of(str(output)).answered.read_text().splitlines()
    assert len(answered) == 1 + 3 * 4 and json.loads(answered[0]) == HEADER


def test_errors_are_passed_over_or_tried_again(output: Path) -> None:
    odd = range(1, 10, 2)
    assert attempt(output, range(10), failing=odd, cut=6) == list(range(6))
    assert attempt(output, range(10), failing=odd) == list(range(6, 10))
    assert attempt(output, range(10)) == []
    assert attempt(output, range(10), resume="retry_errors", failing=[1, 3], cut=3) == [1, 3, 5]
    assert attempt(output, range(10)) == []  # those that weren't tried again before the cut are still errors
    failed = [json.loads(line)["error"] for line in output.read_text().splitlines()]
    assert failed == [row in (1, 3, 7, 9) for row in range(10)]
    assert attempt(output, range(10), resume="retry_errors") == [1, 3, 7, 9]
    assert rows_of(output) == list(range(10)) and '"error": true' not in output.read_text()
    assert attempt(output, range(10), resume="retry_errors") == []
    assert attempt(output, range(10), resume="fresh") == list(range(10))


def test_rows_without_a_key_are_done_by_every_run(output: Path) -> None:
    for _ in range(2):
        with Journal(str(output), ["in.jsonl"], HEADER) as journal:
            done = KeyTable(journal.known)
            assert len(done) == 0
            part = PartWriter(str(output), 0, HEADER)
            part.write(0, answer(0), None, True)
            part.close()
            journal.finish(1, done, 1)
        assert rows_of(output) == [0]


# -- a finished output ------------------------------------------------------------------------------------------------


def test_a_finished_output_is_added_to_whatever_became_of_its_lines(output: Path) -> None:
    attempt(output, range(20), dp=2)
    lines = output.read_text().splitlines(keepends=True)
    assert attempt(output, range(20)) == [] and output.read_text() == "".join(lines)
    output.write_text("\n".join(line.strip() for line in reversed(lines[5:])) + "\r\n")
    added = [*range(30, 33), *range(20)]
    assert attempt(output, added, cut=4) == [30, 31, 32, 0]
    assert attempt(output, added) == [1, 2, 3, 4]
    assert rows_of(output) == added
    assert names(output.parent) == ["out.jsonl", "out.jsonl.journal"]


def test_a_finished_output_that_was_deleted_answers_nothing(output: Path) -> None:
    attempt(output, range(5))
    output.unlink()
    assert attempt(output, range(5)) == list(range(5))
    output.unlink()
    attempt(output, range(5), header=OTHER)  # nobody asks whose keys were left


def test_lines_of_others_are_refused_and_left_alone(output: Path) -> None:
    attempt(output, range(5))
    edited = output.read_text().replace('{"row": 3', '{"row":  3') + '{"mine": 1}\n'
    output.write_text(edited)
    with pytest.raises(ValueError, match=r"2 of its lines aren't as a run wrote them, the first is line 4; choose ano"):
        attempt(output, range(5))
    assert output.read_text() == edited


def test_an_output_of_unknown_origin_is_refused_unless_it_is_empty(output: Path) -> None:
    output.write_text("precious\n")
    with pytest.raises(ValueError, match=r"exists without out.jsonl.journal, .*: choose another output, or resume=fr"):
        attempt(output, range(5))
    assert output.read_text() == "precious\n" and names(output.parent) == ["out.jsonl"]
    attempt(output, range(5), resume="fresh", cut=2)
    assert output.read_text() == "precious\n"  # until all is answered
    attempt(output, range(5))
    assert rows_of(output) == list(range(5))
    empty = output.with_name("empty.jsonl")
    empty.touch()
    attempt(empty, range(5))
    Paths.of(str(empty)).keys.write_text("torn")
    with pytest.raises(ValueError, match=r"empty.jsonl.journal doesn't begin as a run would have written it"):
        attempt(empty, range(5))


def test_rows_that_leave_the_input_are_kept_and_found_when_they_come_back(output: Path) -> None:
    attempt(output, range(10), failing=[2])
    attempt(output, [7, 8, 20, 9], cut=1)
    assert attempt(output, [7, 8, 9]) == []
    assert rows_of(output) == [7, 8, 9]
    kept = output.with_name("out.jsonl.unused").read_text().splitlines()[1:]
    assert sorted(int(line.split("\t")[2].strip("!"), 16) for line in kept) == [*range(7), 20]
    assert attempt(output, [3, 2, 21, 9, 20]) == [21]
    assert rows_of(output) == [3, 2, 21, 9, 20]
    assert attempt(output, range(10), resume="retry_errors") == [2]
    assert attempt(output, [*range(10), 20, 21]) == []
    assert names(output.parent) == ["out.jsonl", "out.jsonl.journal"]


# -- what may not be mixed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [2, None])
def test_another_model_or_sampling_is_refused_with_what_differs(output: Path, cut: int | None) -> None:
    attempt(output, range(5), cut=cut)
    before = {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as error:
        attempt(output, range(5), header=OTHER)
    for word in (
        *(f"output={output}: ", "was made with model.path=/models/a", 'weights was "a", is "b"'),
        *("sampling.top_k was null, is 5; choose another output, or resume=fresh to answer everything anew",),
    ):
        assert word in str(error.value)
    assert "sampling.seed" not in str(error.value)
    assert {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()} == before
    moved = HEADER | {"model.path": "/elsewhere"}
    assert attempt(output, range(5), header=moved, cut=1) == ([2] if cut else [])
    assert attempt(output, range(5), header=OTHER, resume="fresh", cut=1) == [0]
    assert attempt(output, range(5), header=OTHER) == [1, 2, 3, 4]


def test_a_part_alone_still_says_whose_it_is(output: Path) -> None:
    """As when the folder was deleted under way, and rank 0 killed before it noticed."""
    attempt(output, range(5), cut=2)
    Paths.of(str(output)).answered.unlink()
    with pytest.raises(ValueError, match=r"part-0.jsonl was made with model.path=/models/a"):
        attempt(output, range(5), header=OTHER)
    assert attempt(output, range(5)) == [2, 3, 4]


def test_a_requeued_job_that_began_afresh_goes_on(output: Path) -> None:
    job = HEADER | {"job": "17"}
    attempt(output, range(9))
    assert attempt(output, range(9), resume="fresh", header=job, again=True, cut=2) == [0, 1]  # cut before it began
    assert attempt(output, range(9), resume="fresh", header=job, again=True, cut=2) == [2, 3]
    assert attempt(output, range(9), resume="fresh", header=HEADER | {"job": "18"}, again=True, cut=1) == [0]
    assert attempt(output, range(9), resume="fresh", header=job, cut=1) == [0]  # started by hand
    assert attempt(output, range(9), resume="fresh", header=job, again=True) == list(range(1, 9))
    assert attempt(output, range(9), resume="fresh", header=job, again=True) == []  # cut after it was done


def test_outputs_that_cannot_be_written_fail_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output, words in (
        (tmp_path, "is a directory"),
        ("/dev/null", "no regular file"),
        (tmp_path / "file" / "out.jsonl", "can't be written: Not a directory"),
    ):
        with pytest.raises(ValueError, match=words):
            attempt(output, range(3))
    with pytest.raises(ValueError, match="is the input"):
        Journal(str(tmp_path / "." / "file"), [str(tmp_path / "file")], HEADER)
    assert (tmp_path / "file").read_text() == "x" and names(tmp_path) == ["file"]


def test_output_through_a_symbolic_link_and_into_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "deep" / "out.jsonl")
    attempt(tmp_path / "link.jsonl", range(3))
    assert (tmp_path / "link.jsonl").is_symlink() and rows_of(tmp_path / "real" / "deep" / "out.jsonl") == [0, 1, 2]
    assert names(tmp_path) == ["link.jsonl", "real"]


def test_shards_have_outputs_of_their_own() -> None:
    assert shard_output("a/out.jsonl", [3, 10]) == "a/out-00003-of-00010.jsonl"
    assert shard_output("a/out.jsonl", None) == "a/out.jsonl"


# -- one run at a time ------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_with_who_holds_the_output(output: Path) -> None:
    with Journal(str(output), ["in.jsonl"], HEADER), pytest.raises(ValueError) as error:
        attempt(output, range(3), resume="fresh")
    assert f"output={output} is in use by process {os.getpid()} on " in str(error.value)
    attempt(output, range(3))
    assert rows_of(output) == [0, 1, 2]


def test_a_replica_that_outlives_its_rank_0_is_waited_for(output: Path) -> None:
    attempt(output, range(3), cut=1)
    with open(parts(output)[0], "rb+") as straggler:
        fcntl.flock(straggler, fcntl.LOCK_EX)
        for resume in ("auto", "fresh"):
            with pytest.raises(ValueError, match="is in use by"):
                attempt(output, range(3), resume=resume)
    assert attempt(output, range(3)) == [1, 2]


def test_the_end_of_a_run_does_not_race_with_the_next_start(output: Path) -> None:
    """Processes that start and finish runs on one output as fast as they can."""
    code = (
        "import sys; from tests.support.attempts import *\n"
        "from spmd.journal import journal; from tests.support import attempts\n"
        "make = journal.Journal\n"
        "attempts.Journal = lambda *args, patience: make(*args, patience=60)\n"
        "for row in range(15): attempt(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[2]) + row + 1))"
    )
    command = [sys.executable, "-c", code, str(output)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    runs = [subprocess.Popen([*command, first], env=env, stderr=subprocess.PIPE) for first in ("0", "50")]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors.decode()
    assert attempt(output, [*range(15), *range(50, 65)]) == []
    assert names(output.parent) == ["out.jsonl", "out.jsonl.journal"]


# -- deleted under way, cut while it ends, full -----------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False], ids=["to the end", "stopped"])
def test_what_is_deleted_under_way_is_not_lost(output: Path, finished: bool) -> None:
    attempt(output, range(10))
    attempt(output, range(5, 15))
    attempt(output, range(20), cut=2)  # answers are in the output, put aside, and in parts
    there = names(output.parent)
    assert there == ["out.jsonl", "out.jsonl.journal", "out.jsonl.parts", "out.jsonl.unused"]
    with Journal(str(output), ["in.jsonl"], HEADER) as journal:
        done = KeyTable(journal.known)
        for row in range(17):
            done.set(row, row)
        writer = PartWriter(str(output), 0, HEADER)
        for row in (17, 18, 19):
            writer.write(row, answer(row), row)
            for path in sorted(output.parent.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            assert names(output.parent) == []
            if row == 17:
                journal.watch(journal.last_check + 2)
                assert names(output.parent) == there
        writer.close()
        if finished:
            journal.finish(1, done, 3)
    if not finished:
        assert names(output.parent) == there
        assert attempt(output, range(20)) == []
    assert rows_of(output) == list(range(20))


def test_answers_that_are_gone_are_reported_and_answered_again(output: Path) -> None:
    attempt(output, range(10))
    with Journal(str(output), ["in.jsonl"], HEADER) as journal:
        done = KeyTable(journal.known)
        for row in range(10):
            done.set(row, row)
        lines = output.read_bytes().splitlines(keepends=True)
        with open(output, "wb") as file:  # not deleted but emptied, as > does
            file.writelines(lines[:4])
        with pytest.raises(ValueError, match=r"6 answers are gone, .* start again to have these rows answered again"):
            journal.finish(0, done, 0)
    assert attempt(output, range(10)) == list(range(4, 10))
    assert rows_of(output) == list(range(10))


@pytest.mark.parametrize("begun", ["auto", "fresh"])
def test_a_run_that_is_killed_at_any_step_of_its_end_leaves_only_the_rest_of_it_to_do(
    output: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    """Steps are what changes folders; what is in between changes nothing that anybody sees."""
    for count in range(30):
        attempt(output, range(5, 15), resume="fresh")
        first = attempt(output, range(10), resume=begun, cut=3)
        ended = in_a_process(killed_at, count, output)
        again = attempt(output, range(10))
        assert not set(again) & set(first)
        assert not (again and output.with_name("answered").exists())
        assert rows_of(output) == list(range(10))
        assert attempt(output, range(15)) == ([] if begun == "auto" else list(range(10, 15)))
        output.with_name("answered").unlink(missing_ok=True)
        if ended:
            break
    assert count > 8


def killed_at(count: int, output: Path) -> None:
    """A run that is killed at its step of this number, if it has so many."""
    steps = iter(range(count))

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **more: os._exit(9) if next(steps, None) is None else step(*args, **more)

    def marked(*args: Any) -> int:
        output.with_name("answered").touch()
        return finish(*args)

    finish = Journal.finish
    with pytest.MonkeyPatch.context() as patched:
        for name in ("replace", "unlink", "rmdir"):
            patched.setattr(os, name, counted(getattr(os, name)))
        patched.setattr(Journal, "finish", marked)
        attempt(output, range(10))


def in_a_process(function: Callable[..., None], *args: Any) -> bool:
    """Whether a function ends in a process of its own."""
    if not (child := os.fork()):
        try:
            function(*args)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 0


def test_a_full_disk_loses_nothing_and_the_next_start_goes_on(tmp_path: Path) -> None:
    rows, full = range(1600), "can't be written: No space left on device"  # 100 bytes a row in a part
    answered = 0
    with small_disk(tmp_path / "disk", 64) as disk:
        output = disk / "out.jsonl"
        for kib in (64, 136):
            enlarge(disk, kib)
            with pytest.raises(ValueError, match=rf"part-0.jsonl {full} .* it got in this run are safe: mend that, th"):
                attempt(output, rows)
            with pytest.raises(ValueError, match=rf"{full} .*; nothing is lost: mend that, then start again with the"):
                attempt(output, rows)  # to put the answers together takes room
            answered += len(parts(output)[0].read_text().splitlines()) - 1
        enlarge(disk, 260)
        with pytest.raises(ValueError, match=rf"{full} .*; everything is answered and safe, only the output is left"):
            attempt(output, rows)
        assert len(parts(output)[0].read_text().splitlines()) - 1 == len(rows) - answered < 500
        assert names(disk) == ["out.jsonl.parts"]
        enlarge(disk, 600)
        assert attempt(output, rows) == []
        assert rows_of(output) == list(rows) and names(disk) == ["out.jsonl", "out.jsonl.journal"]
