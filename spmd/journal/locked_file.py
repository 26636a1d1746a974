"""Files that a run holds open, so that neither deletion nor another run can take from it what is in them; and the lock.

Locks are flock's: they end with the process that holds them, however it ends. Where a file system has none, two runs on
one output aren't kept apart. The lock of an output is a file among its parts that says who works there.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from spmd.messages import first_line

TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
UNLOCKABLE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
COPY_BYTES = 2**20


class HeldFile:
    """A file held open: for appending, made if it isn't there, or for reading alone.

    Raises:
        OSError: it can't be opened; BlockingIOError: it is to be locked, and somebody else has.
    """

    def __init__(self, path: Path, reading: bool = False, lock: bool = False) -> None:
        self.path = path
        self.lock = lock
        self.fd = os.open(path, os.O_RDONLY if reading else os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        if lock and not _lock(self.fd):
            self.close()
            raise BlockingIOError(errno.EWOULDBLOCK, "another process holds its lock", str(path))

    @property
    def in_place(self) -> bool:
        """Whether the path still leads to what is held."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def reader(self) -> IO[bytes]:
        """A reader of what is held, also of what `restore` makes of it. The file stays open when it is closed."""
        return open(self.fd, "rb", closefd=False)

    def append(self, data: bytes) -> None:
        """Append all of it at once or, if that fails, nothing."""
        done = 0
        try:
            while done < len(data):
                done += os.write(self.fd, memoryview(data)[done:])
        except OSError:
            if done:
                with suppress(OSError):
                    os.ftruncate(self.fd, os.fstat(self.fd).st_size - done)
            raise

    def mend(self) -> None:
        """Drop a last line that has no end."""
        end = os.fstat(self.fd).st_size
        while end > 0:
            start = max(0, end - COPY_BYTES)
            if (newline := os.pread(self.fd, end - start, start).rfind(b"\n")) >= 0:
                end = start + newline + 1
                break
            end = start
        os.ftruncate(self.fd, end)

    def restore(self) -> None:
        """Write the file anew if it was deleted or moved. In place of another one only if that is to be locked too.

        Raises:
            OSError: it can't be written; BlockingIOError: by now another process has locked it.
        """
        if self.in_place or (self.path.exists() and not self.lock):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            HeldFile(self.path, lock=True).close()
            self.path.unlink()
        anew = HeldFile(self.path, lock=self.lock)
        offset = 0
        while block := os.pread(self.fd, COPY_BYTES, offset):
            anew.append(block)
            offset += len(block)
        os.dup2(anew.fd, self.fd, inheritable=False)
        anew.close()

    def sync(self) -> None:
        """Return when the file system has all of it; a network file system may find only then that it is full."""
        os.fsync(self.fd)

    def close(self) -> None:
        """Close it and give back its lock; again does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> "HeldFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cannot_write(what: str, folder: Path, error: OSError) -> str:
    """That something in a folder can't be written and why, as the beginning of a message."""
    reason = error.strerror or first_line(error)
    if error.errno == errno.ENOSPC:
        usage = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists()))
        reason += f" ({usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB are free)"
    return f"{what} can't be written: {reason}"


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*TAKEN, *UNLOCKABLE):
            raise
        return error.errno in UNLOCKABLE
    return True


POLL = 0.1  # seconds


def take_lock(path: Path, patience: float) -> HeldFile:
    """Lock the file, made with its folder if need be, and write into it who does.

    Raises:
        BlockingIOError: after `patience` seconds somebody still holds it; its message says who.
    """
    deadline = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the run before has just removed the folder
            lock = locked(path, deadline)
            if lock.in_place:
                os.ftruncate(lock.fd, 0)
                lock.append(json.dumps(_me()).encode())
                return lock
            lock.close()
        if time.monotonic() > deadline + patience:
            raise BlockingIOError(f"{path} is another file at each look")


def locked(path: Path, deadline: float) -> HeldFile:
    """A file opened and locked; one that was killed a moment ago may still hold it.

    Raises:
        BlockingIOError: somebody still holds it at `deadline`, by the monotonic clock.
    """
    while True:
        try:
            return HeldFile(path, lock=True)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(POLL)


def give_back(lock: HeldFile) -> None:
    """Remove the lock, and its folder if nothing else is in it. Somebody who waits for it finds it gone and retries."""
    with suppress(OSError):
        if lock.in_place:
            lock.path.unlink()
        lock.path.parent.rmdir()
    lock.close()


def holder(path: Path) -> str:
    """Who wrote the lock file, for people."""
    try:
        who = json.loads(path.read_bytes())
        return f"process {who['pid']} on {who['host']}, started {who['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _me() -> dict[str, str | int]:
    started = datetime.now().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
