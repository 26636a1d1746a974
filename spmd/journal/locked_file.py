"""Files that a run keeps open, so that neither deletion nor another run can take from it what is in them; and the lock.

Deletion takes a file's name; its content stays for those who have it open, and `restore` writes it anew under the name.
Against other runs there are flock's locks: one open file at a time has a file's lock, and it ends with the process,
however that ends. Only who has opened a file with its lock writes to it. Where a file system has no locks, two runs on
one output aren't kept apart. The lock of an output is a file among its parts that says who works there.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
UNLOCKABLE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
COPY_BYTES = 2**20
POLL = 0.1  # seconds between attempts to lock a file


class OpenFile:
    """A file kept open: for appending, made if it isn't there, or for reading alone. With `lock`, locked too.

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
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.fd))
        except FileNotFoundError:
            return False

    def reader(self) -> IO[bytes]:
        """A reader of its content, also of what `restore` makes of it. Closing the reader leaves the file open."""
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
        """Write the file anew if it was deleted or moved.

        Where another file stands in its place by now, that one stays; but if this file is locked, the other one is
        replaced once its lock is had too, which shows that nobody writes it. `fd` stays the same number, so that
        readers go on in the new file, whose content is equal. The new file is locked before the old one is let go.

        Raises:
            OSError: it can't be written; BlockingIOError: by now another process has locked it.
        """
        if self.in_place or (self.path.exists() and not self.lock) or self.renumbered:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            OpenFile(self.path, lock=True).close()
            self.path.unlink()
        anew = OpenFile(self.path, lock=self.lock)
        offset = 0
        while block := os.pread(self.fd, COPY_BYTES, offset):
            anew.append(block)
            offset += len(block)
        os.dup2(anew.fd, self.fd, inheritable=False)
        anew.close()

    @property
    def renumbered(self) -> bool:
        """Whether the file at the path is this one under another number, as on file systems that make numbers up anew.

        Two files don't have the same size and time of change, to the nanosecond; an empty one tells too little.
        """
        with suppress(FileNotFoundError):
            there, own = os.stat(self.path), os.fstat(self.fd)
            return own.st_size > 0 and (there.st_size, there.st_mtime_ns) == (own.st_size, own.st_mtime_ns)
        return False

    def sync(self) -> None:
        """Return when the file system has all of it; a network file system may find only then that it is full."""
        os.fsync(self.fd)

    def close(self) -> None:
        """Close it and give back its lock; again does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lock(fd: int) -> bool:
    """Whether the lock is had, or the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (*TAKEN, *UNLOCKABLE):
            raise
        return error.errno in UNLOCKABLE
    return True


def acquire_lock(path: Path, patience: float) -> OpenFile:
    """Lock the file, made with its folder if need be, and write into it who does.

    Whoever had the lock removes the file, see `release_lock`, perhaps between our opening it and our lock: then we have
    locked a file without a name, while others may make and lock a new one. So the path is looked at once more when the
    lock is had; only who finds the same file there has the output, and all others begin again.

    Raises:
        BlockingIOError: after `patience` seconds somebody still has it.
    """
    deadline = time.monotonic() + patience
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the run before has just removed the folder
            lock = open_locked(path, deadline)
            if lock.in_place:
                os.ftruncate(lock.fd, 0)
                lock.append(json.dumps(_me()).encode())
                return lock
            lock.close()
        if time.monotonic() > deadline + patience:
            raise BlockingIOError(f"{path} is another file at each look")


def open_locked(path: Path, deadline: float) -> OpenFile:
    """A file opened and locked; a process that was killed a moment ago may still have its lock.

    Raises:
        BlockingIOError: somebody still has it at `deadline`, by the monotonic clock.
    """
    while True:
        try:
            return OpenFile(path, lock=True)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(POLL)


def release_lock(lock: OpenFile) -> None:
    """Remove the lock file, and its folder if nothing else is in it; only then give up the lock.

    Somebody who waits for the lock gets it on a file that is gone by then, sees that, and makes a new one.
    """
    with suppress(OSError):
        if lock.in_place or lock.renumbered:
            lock.path.unlink()
        lock.path.parent.rmdir()
    lock.close()


def lock_holder(path: Path) -> str:
    """Who wrote the lock file, for people."""
    try:
        who = json.loads(path.read_bytes())
        return f"process {who['pid']} on {who['host']}, started {who['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _me() -> dict[str, str | int]:
    started = datetime.now().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
