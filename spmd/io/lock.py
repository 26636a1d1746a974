"""One run at a time on an output: a lock file among its parts that says who works there."""

import json
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from spmd.io.held import Held

POLL = 0.1  # seconds


def take_lock(path: Path, patience: float) -> Held:
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


def locked(path: Path, deadline: float) -> Held:
    """A file opened and locked; one that was killed a moment ago may still hold it.

    Raises:
        BlockingIOError: somebody still holds it at `deadline`, by the monotonic clock.
    """
    while True:
        try:
            return Held(path, lock=True)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(POLL)


def give_back(lock: Held) -> None:
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
