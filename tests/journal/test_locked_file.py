import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmd.journal.locked_file import OpenFile, acquire_lock, lock_holder, open_locked, release_lock
from tests.support.attempts import small_disk

HOLDING = (
    "import sys, time; from pathlib import Path; from spmd.journal.locked_file import acquire_lock\n"
    "print('ready', flush=True)\n"
    "lock = acquire_lock(Path(sys.argv[1]), float(sys.argv[2])); print('held', flush=True); time.sleep(60)"
)


def holding(path: Path, patience: float) -> subprocess.Popen[str]:
    """A process that takes a lock; it is about to when this returns."""
    command = [sys.executable, "-c", HOLDING, str(path), str(patience)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert next_line(process) == "ready\n"
    return process


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_one_at_a_time_and_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "parts" / "lock"
    process = holding(path, 0)
    try:
        assert next_line(process) == "held\n"
        with pytest.raises(BlockingIOError):
            acquire_lock(path, 0.2)
        assert lock_holder(path).startswith(f"process {process.pid} on {socket.gethostname()}, started 20")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    lock = acquire_lock(path, 0)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    release_lock(lock)
    assert not path.parent.exists()
    assert lock_holder(path) == "another process"


def test_whoever_waits_for_a_lock_that_is_removed_makes_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "parts" / "lock"
    first = acquire_lock(path, 0)
    waiting = holding(path, 30)
    try:
        release_lock(first)
        assert next_line(waiting) == "held\n"
        assert json.loads(path.read_text())["pid"] == waiting.pid
        with pytest.raises(BlockingIOError):
            acquire_lock(path, 0)
    finally:
        waiting.kill()
        waiting.communicate()


def test_a_file_system_without_locks_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = (open_locked(tmp_path / "file", time.monotonic()) for _ in range(2))
    first.close()
    second.close()


@pytest.mark.parametrize("lost", ["deleted", "folder deleted", "moved"])
def test_what_is_held_comes_back_with_its_lock(tmp_path: Path, lost: str) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    with OpenFile(path, lock=True) as file:
        file.append(b"one\n")
        file.restore()
        before = path.stat().st_ino
        if lost == "moved":
            path.rename(tmp_path / "elsewhere")
        else:
            path.unlink()
        if lost == "folder deleted":
            path.parent.rmdir()
        file.append(b"two\n")
        assert not file.in_place
        file.restore()
        assert file.in_place and path.stat().st_ino != before
        file.append(b"three\n")
        assert path.read_bytes() == b"one\ntwo\nthree\n"
        with pytest.raises(BlockingIOError):
            OpenFile(path, lock=True)


def test_what_another_put_there_stays_unless_both_are_to_be_locked_and_it_is_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with OpenFile(path) as file, open(path, "ab"):
        path.unlink()
        path.write_text("another's")
        file.restore()
        assert path.read_text() == "another's"
    with OpenFile(path, lock=True) as file:
        path.unlink()
        with OpenFile(path, lock=True), pytest.raises(BlockingIOError):
            file.restore()
        file.restore()
        assert path.read_text() == "another's"  # now the first one's again


def test_an_append_is_whole_or_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk, OpenFile(disk / "file") as file:
        file.append(b"x" * 40_000)
        with pytest.raises(OSError) as failed:
            file.append(b"y" * 60_000)
        assert failed.value.errno == errno.ENOSPC
        assert (disk / "file").read_bytes() == b"x" * 40_000
        file.append(b"z" * 1000)
        assert (disk / "file").stat().st_size == 41_000


@pytest.mark.parametrize("whole", [b"", b"a\n", b"a\nb\n"])
@pytest.mark.parametrize("torn", [b"", b"c", b"c" * 3_000_000])
def test_a_torn_last_line_is_dropped(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    (tmp_path / "file").write_bytes(whole + torn)
    with OpenFile(tmp_path / "file") as file:
        file.mend()
        file.append(b"d\n")
    assert (tmp_path / "file").read_bytes() == whole + b"d\n"


def test_a_file_under_a_new_number_is_not_copied_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems make up a file's number at every look; one that was replaced differs in size or time, too."""
    file = OpenFile(tmp_path / "part", lock=True)
    file.append(b"answers\n")
    before = os.stat(file.path).st_ino
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    for _ in range(3):
        file.restore()
    assert os.stat(file.path).st_ino == before == os.fstat(file.fd).st_ino
    (tmp_path / "part").unlink()
    (tmp_path / "part").write_bytes(b"another\n")
    file.restore()
    assert (tmp_path / "part").read_bytes() == b"answers\n"
    file.close()


def test_a_lock_under_a_new_number_is_removed_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = acquire_lock(tmp_path / "parts" / "lock", 0)
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    release_lock(lock)
    assert not (tmp_path / "parts").exists()
