"""The flight recorder, read as the guard and a peer read it."""

import mmap
import multiprocessing
import os
import signal
import time
from array import array
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from spmd.config import GuardConfig
from spmd.guard.ending import Place, this_place
from spmd.guard.guard import Guard
from spmd.guard.recorder import NONE, SIZE, TICKS, Peer, Recorder, traced
from spmd.signals import Stop
from spmd.topology import Topology


def digests(tick: int) -> tuple[int, ...]:
    return tick, 2**32 - 1, 3 * tick, 0


def test_the_last_ticks_are_kept() -> None:
    recorder = Recorder()
    assert traced(recorder.content()) == (NONE, {})
    for tick in range(3 * TICKS):
        recorder.write(tick, digests(tick))
    assert recorder.tick == 3 * TICKS - 1
    assert traced(recorder.content()) == (3 * TICKS - 1, {tick: digests(tick) for tick in range(2 * TICKS, 3 * TICKS)})


def killed(end: Connection) -> None:
    recorder = Recorder()
    end.send(recorder.fd)
    end.recv()
    for tick in range(10):
        recorder.write(tick, digests(tick))
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_did_can_be_read() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=killed, args=(theirs,))
    process.start()
    assert process.pid
    peer = Peer(process.pid, ours.recv())
    ours.send("opened")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert traced(peer.content()) == (9, {tick: digests(tick) for tick in range(10)})
    peer.close()
    with pytest.raises(OSError):
        Peer(process.pid, 3)


def test_nobody_can_cut_short_what_the_loop_writes_to() -> None:
    """A mapped file that is truncated, or whose disk has no room, ends whoever writes to it by SIGBUS."""
    recorder = Recorder()
    with open(f"/proc/self/fd/{recorder.fd}", "r+b") as opened:
        for size in (0, 2 * SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(opened.fileno(), size)
    assert os.fstat(recorder.fd).st_blocks * 512 >= SIZE
    recorder.write(1, digests(1))
    assert traced(recorder.content()) == (1, {1: digests(1)})


def test_it_has_no_name_and_can_be_read_after_its_door_is_shut(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    recorder = Recorder()
    assert set(os.listdir("/dev/shm")) == before and os.listdir(tmp_path) == []
    assert os.fstat(recorder.fd).st_nlink == 0
    recorder.close()
    recorder.write(5, digests(5))
    assert traced(recorder.content()) == (5, {5: digests(5)})


def test_an_entry_that_is_just_written_is_passed_over() -> None:
    recorder = Recorder()
    recorder.write(4, digests(4))
    with mmap.mmap(recorder.fd, SIZE) as memory:
        memory[8 * (1 + 5 * 4) : 8 * (1 + 5 * 4) + 16] = array("q", [NONE, 7]).tobytes()
    assert traced(recorder.content())[1].keys() <= {4}


def test_ranks_of_another_machine_read_what_was_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's last sign of life is of tick 3, and it went on to tick 9; only its neighbour sees its recorder."""
    store = dist.HashStore()
    monkeypatch.setattr("spmd.guard.guard._connect_store", lambda timeout: store)
    config = GuardConfig(timeout=0.02)
    lost, neighbour, far = (Guard(Topology(1, 3, 1, rank), config, tmp_path, Stop(), False) for rank in range(3))
    for tick in range(10):
        lost.recorder.write(tick, digests(tick))
        if tick == 3:
            lost._send_beat()
    here = this_place(lost.topology, lost.recorder.fd)
    neighbour.recorders[0] = Peer(here.pid, here.recorder)
    far.places = [here, Place("the neighbour", here.machine, 0, 0), Place("far away", "another", 0, 0)]
    assert far._status(0).tick == 3
    neighbour._write_down()
    assert [file.name for file in tmp_path.iterdir()] == ["rank-0.recorder"]
    time.sleep(4 * far.beat)  # without a sign of life
    seen = far._status(0)
    assert (seen.tick, seen.trace) == (9, {tick: digests(tick) for tick in range(10)})
    (tmp_path / "rank-0.recorder").write_bytes(b"")  # as of a full disk
    assert far._status(0).tick == 3
