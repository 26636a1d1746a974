"""The flight recorder, read as the guard and a peer read it."""

import multiprocessing
import os
import signal
from pathlib import Path

from spmd.guard.recorder import NONE, TICKS, Recorder, traced


def digests(tick: int) -> tuple[int, ...]:
    return tick, 2**32 - 1, 3 * tick, 0


def test_the_last_ticks_are_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "box")
    assert traced(recorder.content()) == (NONE, {})
    for tick in range(3 * TICKS):
        recorder.write(tick, digests(tick))
    assert recorder.tick == 3 * TICKS - 1
    assert traced(recorder.content()) == (3 * TICKS - 1, {tick: digests(tick) for tick in range(2 * TICKS, 3 * TICKS)})


def killed(file: Path) -> None:
    recorder = Recorder(file)
    for tick in range(10):
        recorder.write(tick, digests(tick))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_did_can_be_read(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "box",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert traced((tmp_path / "box").read_bytes()) == (9, {tick: digests(tick) for tick in range(10)})


def test_a_new_recorder_forgets_an_earlier_attempt(tmp_path: Path) -> None:
    Recorder(tmp_path / "box").write(5, digests(5))
    assert traced(Recorder(tmp_path / "box").content()) == (NONE, {})
