"""How long things take: a device's work on one stage, without ever waiting for it, and the phases of start-up."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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


@dataclass
class Phases:
    """Phases follow one another without a gap; `seconds` has them by name, in order."""

    since: float  # when the running phase began, on perf_counter's clock
    seconds: dict[str, float] = field(default_factory=dict)

    def end(self, name: str) -> None:
        """The running phase ends and is called `name`; a name used before gets the sum."""
        now = perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
