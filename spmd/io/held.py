"""Files that a run holds open, so that neither deletion nor another run can take from it what is in them.

Locks are flock's: they end with the process that holds them, however it ends. Where a file system has none, two runs on
one output aren't kept apart.
"""

import errno
import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from spmd.io.wording import first_line

TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
UNLOCKABLE = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)
COPY_BYTES = 2**20


class Held:
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
            Held(self.path, lock=True).close()
            self.path.unlink()
        anew = Held(self.path, lock=self.lock)
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

    def __enter__(self) -> "Held":
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
