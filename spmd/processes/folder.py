"""The folder through which finished rows reach the ranks of a node, batch after batch.

Who writes, who reads, what orders them: each batch is a file that a builder writes under another name and then
renames, so whoever finds it finds all of it. Every rank of the node reads the batches in their order and after each
raises its own eight bytes in `taken`, which it alone writes; a number of eight bytes is stored at once. The feeder
reads all of `taken`: it removes batches that every rank has read, and stays at most AHEAD batches in front of the
slowest. It holds a lock on the folder as long as it lives, so a rank that waits in vain finds out.
"""

import fcntl
import os
import pickle
import shutil
import tempfile
from array import array
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from time import perf_counter, sleep, time
from typing import NamedTuple

MEMORY = Path("/dev/shm")
AHEAD = 16  # batches
PATIENCE = 1.0  # seconds without a batch after which a rank looks whether there is still a feeder
NAP = 0.0005  # seconds between two looks
YOUNG = 60.0  # seconds
ROOM = 2**30  # bytes that memory's file system must have left; containers are often given 64 MiB of it
PREFIX = "spmd-rows-"
LOCK, TAKEN, FAILED = "feeder", "taken", "failed"


class Built(NamedTuple):
    """A row that is to be answered."""

    num_requests: int
    tokens: int | None  # most that one of them may be given; None: the row can't be answered
    packed: bytes  # see `spmd.processes.packed`


class Batch(NamedTuple):
    """Some rows of the input, one behind the other. Which ones is a function of the input alone."""

    rows: list[Built]  # those to answer
    met: list[tuple[int, int]]  # rows done before: the place of each in the table of keys, and its number
    num_rows: int  # of the input gone through by the end of this batch
    consumed: int  # bytes of the input likewise
    prioritized: int  # rows with a priority likewise
    begun_twice: int  # prompts of this batch alone, see `RowParser.begun_twice`
    last: bool


class Folder:
    """One end of it. `ranks` of the node, counted from 0, take from it."""

    def __init__(self, path: Path, ranks: int) -> None:
        self.path = path
        with open(path / TAKEN, "r+b") as file:
            self.taken = memoryview(mmap(file.fileno(), 8 * ranks)).cast("q")

    @staticmethod
    def make(ranks: int) -> Path:
        """A new one, held by this process; in memory where the system has a file system there, with room."""
        in_memory = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM
        base = MEMORY if in_memory else Path(tempfile.gettempdir())
        _remove_abandoned(base)
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        (path / LOCK).touch()
        hold(path)
        (path / TAKEN).write_bytes(array("q", [0] * ranks).tobytes())
        return path

    def publish(self, number: int, batch: Batch) -> None:
        """Let the ranks have a batch."""
        file = self.path / f"{number}.new"
        file.write_bytes(pickle.dumps(batch))
        file.rename(self.path / str(number))

    def fail(self, reason: str) -> None:
        """No batch will come any more."""
        file = self.path / f"{FAILED}.new"
        file.write_text(reason)
        file.rename(self.path / FAILED)

    def remove_taken(self, first: int) -> int:
        """Remove batches from `first` on that all ranks have read; returns the first that is left."""
        least = min(self.taken)
        for number in range(first, least):
            (self.path / str(number)).unlink()
        return least

    def receive(self, rank: int) -> Batch:
        """The next batch of a rank of the node; waits for it.

        Raises:
            RuntimeError: none will come, and why.
        """
        number = self.taken[rank]
        file, since = self.path / str(number), perf_counter()
        while True:
            with suppress(FileNotFoundError):
                batch: Batch = pickle.loads(file.read_bytes())
                break
            if perf_counter() - since > PATIENCE:
                self._check_feeder(file)
                since = perf_counter()
            sleep(NAP)
        self.taken[rank] = number + 1
        return batch

    def _check_feeder(self, file: Path) -> None:
        with suppress(FileNotFoundError):
            raise RuntimeError(f"the rows' reader failed: {(self.path / FAILED).read_text()}")
        if abandoned(self.path) and not file.exists():
            raise RuntimeError("the process that reads the rows is gone; was it killed for memory?")


def hold(path: Path) -> None:
    """Take the lock for as long as this process, or a child that it forks from now on, lives."""
    fcntl.flock(os.open(path / LOCK, os.O_RDWR), fcntl.LOCK_EX)


def abandoned(path: Path) -> bool:
    """Whether nobody holds the lock."""
    try:
        file = os.open(path / LOCK, os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)


def _remove_abandoned(base: Path) -> None:
    """Folders whose feeder was killed before it could remove them. One that was just made may not be held yet."""
    for path in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = path.stat()
            if status.st_uid == os.getuid() and time() - status.st_mtime > YOUNG and abandoned(path):
                shutil.rmtree(path)
