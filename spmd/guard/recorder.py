"""The flight recorder: where a rank stands and what it did in the last ticks, in a file that outlives it.

The loop writes to mapped memory, a few numbers a tick. The guard's thread reads it and sends it along with its signs of
life. The file itself is read by the guards of other ranks, on the same host or file system, when this rank has given no
sign of life for some beats: what is in the file survives the process. Gloo, for one, aborts a process whose peers send
it messages of another size, and it can't say any more what it did.

`StallDetector` tells, from the recorder's tick and the loop's processor time, whether a rank's loop gets on.
"""

import mmap
import threading
import time
from array import array
from pathlib import Path

from spmd.schedule.digests import FIELDS, Digests

TICKS = 64  # kept; ranks of a replica are never so many apart
ENTRY = 1 + len(FIELDS)
NONE = -1
SIZE = (1 + TICKS * ENTRY) * 8

BUSY = 0.1  # seconds of processor time by which a CPU rank shows that it computes

Trace = dict[int, Digests]  # of the last ticks


class Recorder:
    """int64 numbers: the last tick, then TICKS entries, written in turn, of a tick and its digests. One file a rank.

    The loop alone writes. The guard of the same process copies it under the interpreter's lock, between two of the
    loop's stores and never within one.
    """

    def __init__(self, file: Path) -> None:
        """Makes the file, in place of an earlier attempt's.

        Raises:
            ValueError: it can't be made.
        """
        try:
            file.write_bytes(array("q", [NONE] * (SIZE // 8)).tobytes())
        except OSError as error:
            raise ValueError(f"{file} can't be written: {error.strerror}") from error
        with open(file, "r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), SIZE)
        self._numbers = memoryview(self._map).cast("q")

    @property
    def tick(self) -> int:
        """The last tick; NONE before the first."""
        return self._numbers[0]

    def write(self, tick: int, digests: Digests) -> None:
        """A tick was planned.

        The entry is marked as none before its digests are stored and gets its tick after them, so whoever copies it in
        between finds it marked, and else finds it whole.
        """
        at, numbers = 1 + tick % TICKS * ENTRY, self._numbers
        numbers[at] = NONE
        numbers[at + 1 : at + ENTRY] = memoryview(array("q", digests))
        numbers[at] = numbers[0] = tick

    def content(self) -> bytes:
        """A copy of all numbers, for `traced`."""
        return bytes(self._numbers)


def traced(content: bytes) -> tuple[int, Trace]:
    """The last tick, NONE before the first, and the digests of the last ticks, from a recorder's content.

    Raises:
        IndexError: there is no content, as of a file that was only just made.
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
