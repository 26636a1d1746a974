"""Whether a rank's loop gets on, as far as another thread can see."""

import threading
import time

from spmd.parallel.recorder import Recorder

BUSY = 0.1  # seconds of processor time by which a CPU rank shows that it computes


class Motion:
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
