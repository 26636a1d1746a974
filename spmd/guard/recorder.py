"""The flight recorder: where a rank stands and what it did in the last ticks, in a file that outlives it.

The loop writes to mapped memory, a few numbers a tick; the guard reads it, and that of a peer on the same host, or on
the same file system, when the peer can't say any more what it did: Gloo aborts a process whose peers send it messages
of another size.

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

Trace = dict[int, Digests]  # of the last ticks


class Recorder:
    """int64 numbers: the last tick, then in turn entries of a tick and its digests. The loop alone writes."""

    def __init__(self, file: Path) -> None:
        """Raises ValueError if the file can't be made."""
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
        """A tick was planned. Its number comes after its digests: a reader finds an entry whole or marked as none."""
        at, numbers = 1 + tick % TICKS * ENTRY, self._numbers
        numbers[at] = NONE
        numbers[at + 1 : at + ENTRY] = memoryview(array("q", digests))
        numbers[at] = numbers[0] = tick

    def content(self) -> bytes:
        """What `traced` understands."""
        return bytes(self._numbers)


def traced(content: bytes) -> tuple[int, Trace]:
    """The last tick, and the digests of the last ticks, of what a recorder held."""
    numbers = array("q", content[:SIZE])
    entries = [numbers[at : at + ENTRY] for at in range(1, len(numbers), ENTRY)]
    return numbers[0], {entry[0]: tuple(entry[1:]) for entry in entries if entry[0] != NONE}


BUSY = 0.1  # seconds of processor time by which a CPU rank shows that it computes


class StallDetector:
    """For how long a loop has neither ended a tick nor, on a CPU, computed."""

    def __init__(self, recorder: Recorder, computes: bool) -> None:
        """To be made in the loop's thread."""
        self.recorder = recorder
        self.clock = time.pthread_getcpuclockid(threading.get_ident()) if computes else None
        self.moved, self.tick, self.used = time.monotonic(), recorder.tick, 0.0

    def still(self) -> float:
        """Seconds, as far as seen by calls of this."""
        now = time.monotonic()
        used = time.clock_gettime(self.clock) if self.clock is not None else 0.0
        if self.tick != self.recorder.tick or used - self.used > BUSY:
            self.moved, self.tick, self.used = now, self.recorder.tick, used
        return now - self.moved
