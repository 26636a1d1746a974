"""How long a device was at work on one stage, measured without ever waiting for it."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

Marks = tuple[torch.cuda.Event, torch.cuda.Event]  # where a block begins and ends


class StageClock:
    """Adds up the time of `with clock.busy():` blocks, which may not nest.

    On a GPU that is the time its current stream takes from one end of the block to the other: from when all work
    queued before is done, such as waiting for hidden states, until all work queued inside is. Events are read once they
    have passed, so that no block waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = 0.0  # read so far
        self.pending: deque[Marks] = deque()  # not read yet, oldest first
        self.free: list[Marks] = []

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count what happens inside; not if it raises."""
        if not self.cuda:
            started = perf_counter()
            yield
            self.seconds += perf_counter() - started
            return
        while self.pending and self.pending[0][1].query():
            self._read()
        begin, end = self.free.pop() if self.free else (_event(), _event())
        begin.record()
        yield
        end.record()
        self.pending.append((begin, end))

    def total(self) -> float:
        """Seconds of all blocks so far; waits for the device to be done with them."""
        if self.pending:
            self.pending[-1][1].synchronize()
        while self.pending:
            self._read()
        return self.seconds

    def _read(self) -> None:
        begin, end = pair = self.pending.popleft()
        self.seconds += begin.elapsed_time(end) / 1e3
        self.free.append(pair)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
