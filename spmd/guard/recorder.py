"""The flight recorder: where a rank stands and what it did in the last ticks, in memory that outlives it.

Who writes: the rank's loop alone, a few numbers a tick, to memory of its own. It is no file: it has no name that could
be deleted, and it is sealed, so nobody can cut it short, which would kill whoever writes to it; all of it is there from
the beginning, so no full disk can either.

Who reads: the guard's thread of the same rank, which sends a copy along with its signs of life; and the guards of other
ranks on the same machine, each through a descriptor of its own that it opens while all live, see `Peer`. So the memory
is still there when its rank has ended: gloo, for one, aborts a process whose peers send it messages of another size,
and it can't say any more what it did. Ranks of other machines read what is written on demand, see `Guard`.

What orders them: within the process the interpreter's lock. A peer looks only when the rank has given no sign of life
for some beats, and may find it within a store all the same: an entry is marked as none before its digests are stored
and gets its tick after them.

`StallDetector` tells, from the recorder's tick and the loop's processor time, whether a rank's loop gets on.
"""

import fcntl
import mmap
import os
import threading
import time
from array import array

from spmd.schedule.digests import FIELDS, Digests

TICKS = 64  # kept; ranks of a replica are never so many apart
ENTRY = 1 + len(FIELDS)
NONE = -1
SIZE = (1 + TICKS * ENTRY) * 8

BUSY = 0.1  # seconds of processor time by which a CPU rank shows that it computes

Trace = dict[int, Digests]  # of the last ticks


class Recorder:
    """int64 numbers: the last tick, then TICKS entries, written in turn, of a tick and its digests."""

    def __init__(self) -> None:
        """Takes the memory.

        Raises:
            ValueError: there is none.
        """
        try:
            self.fd = os.memfd_create("recorder", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.posix_fallocate(self.fd, 0, SIZE)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self.fd, SIZE)
        except OSError as error:
            raise ValueError(f"no memory for the flight recorder: {error.strerror}") from error
        self._numbers = memoryview(self._map).cast("q")
        self._numbers[:] = memoryview(array("q", [NONE] * (SIZE // 8)))

    @property
    def tick(self) -> int:
        """The last tick; NONE before the first."""
        return self._numbers[0]

    def write(self, tick: int, digests: Digests) -> None:
        """A tick was planned.

        Whoever copies an entry in between finds it marked as none, and else finds it whole.
        """
        at, numbers = 1 + tick % TICKS * ENTRY, self._numbers
        numbers[at] = NONE
        numbers[at + 1 : at + ENTRY] = memoryview(array("q", digests))
        numbers[at] = numbers[0] = tick

    def content(self) -> bytes:
        """A copy of all numbers, for `traced`."""
        return bytes(self._numbers)

    def close(self) -> None:
        """No peer can open it any more; it can still be read and written here."""
        os.close(self.fd)


class Peer:
    """A reader of another process's recorder on this machine, opened while that process lives; it outlives it."""

    def __init__(self, pid: int, fd: int) -> None:
        """Raises: OSError: it can't be had: the process is gone, or a container hides it."""
        self._fd = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)

    def content(self) -> bytes:
        """As `Recorder.content`."""
        return os.pread(self._fd, SIZE, 0)

    def close(self) -> None:
        os.close(self._fd)


def traced(content: bytes) -> tuple[int, Trace]:
    """The last tick, NONE before the first, and the digests of the last ticks, from a recorder's content.

    Raises:
        IndexError: there is no content.
    """
    numbers = array("q", content[:SIZE])
    entries = [numbers[at : at + ENTRY] for at in range(1, len(numbers), ENTRY)]
    return numbers[0], {entry[0]: tuple(entry[1:]) for entry in entries if entry[0] != NONE}


class StallDetector:
    """For how long a loop has neither ended a tick nor, on a CPU, computed.

    Two threads of the guard may ask at once. Each stores only what it has seen just now, so at worst the same motion
    counts for both, a moment later for one.
    """

    def __init__(self, recorder: Recorder, computes: bool) -> None:
        """To be made in the loop's thread, whose processor time is looked at if it `computes`."""
        self.recorder = recorder
        self.clock = time.pthread_getcpuclockid(threading.get_ident()) if computes else None
        self.moved, self.tick, self.used = time.monotonic(), recorder.tick, 0.0

    def seconds(self) -> float:
        """Since the last motion, as far as seen by calls of this."""
        now = time.monotonic()
        used = time.clock_gettime(self.clock) if self.clock is not None else 0.0
        if self.tick != self.recorder.tick or used - self.used > BUSY:
            self.moved, self.tick, self.used = now, self.recorder.tick, used
        return now - self.moved
