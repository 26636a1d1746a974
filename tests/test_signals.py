"""Signals as a process gets them: gently in a loop, at once elsewhere and the second time."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spmd.signals import STOPPED, code, listening, name
from tests.support.jobs import ROOT

WAITS = """
import ctypes, sys
from spmd.signals import listening, name
with listening(3) as stop:
    with stop.gentle() if sys.argv[1] == "loop" else open("/dev/null"):
        print("ready", flush=True)
        while not stop.asked:
            if sys.argv[2] == "collective": ctypes.CDLL(None).poll(None, 0, -1)  # as deaf as one that waits in C++
        print(name(stop.asked), flush=True)
        ctypes.CDLL(None).poll(None, 0, -1)
"""


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "SPMD_STATUS": str(folder / "status")}
    process = subprocess.Popen([sys.executable, "-c", WAITS, *args], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_loop_is_asked_first_and_ended_the_second_time(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "loop", "computing")
    assert process.stdout is not None
    process.send_signal(number)
    process.send_signal(number)  # Ctrl-C: from the terminal and from torchrun
    assert process.stdout.readline() == f"{number.name} on rank 3\n"
    ended = select.select([os.pidfd_open(process.pid)], [], [], 1.2)[0]
    assert not ended
    process.send_signal(number)
    assert process.wait(20) == STOPPED
    assert not (tmp_path / "status").exists(), "it may follow from another rank's crash"


def test_a_rank_that_waits_in_a_collective_hears_too(tmp_path: Path) -> None:
    process = start(tmp_path, "loop", "collective")
    process.send_signal(signal.SIGTERM)
    assert not select.select([os.pidfd_open(process.pid)], [], [], 1.2)[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == STOPPED


def test_outside_a_loop_the_first_ends_the_rank(tmp_path: Path) -> None:
    process = start(tmp_path, "start-up", "collective")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == STOPPED
    assert not (tmp_path / "status").exists(), "it may follow from another rank's crash"


def test_handlers_are_left_as_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with listening(0):
        assert signal.getsignal(signal.SIGINT) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_codes_name_signal_and_rank_and_fit_into_a_load() -> None:
    assert name(code(1023, signal.SIGUSR1)) == "SIGUSR1 on rank 1023"
    assert code(0, signal.SIGINT) > 0 and code(2**20, signal.SIGTERM) < 2**31


def test_a_terminal_that_goes_away_stops_nothing_under_nohup() -> None:
    """nohup has SIGHUP ignored, which a handler of ours would undo."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(0):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
