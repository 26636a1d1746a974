"""What a GPU does in each phase, from events on its stream, which are read once they have passed: nobody waits for it.

The host runs ahead of its device, so its own phases don't tell what the device does. Therefore the stage's phases end
twice: for the host where they do, and for the device where an event stands that is recorded there. Between two events
the device does what is called like the second one, or waits for it, as for hidden states.

What is left is the gap between the last event of a tick and the first one of the next, which is recorded just before
the stage's turn. There are two kinds of gaps:

- If the device had passed all events when the host came to record that one, it had nothing to do and was waiting for
  the host. The gap ended at that moment, so it is counted by what the host did in as much time before it: waiting for
  a packet, for rows, planning.
- Else the host is ahead. The gap is the device's own small work between forwards (copies of inputs and tokens); it
  counts as INPUTS.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Any, Protocol

import torch

from spmd.trace.account import Account, Ledger
from spmd.trace.host_clock import HostClock
from spmd.trace.phases import NUM_PHASES, Phase

ON_DEVICE = frozenset({Phase.FEEDBACK, Phase.INPUTS, Phase.HIDDEN, Phase.SAMPLE, Phase.SEND})  # and FORWARD
BACKWARD = (*range(Phase.REPORT, -1, -1), Phase.RETURN, Phase.SAMPLES, Phase.SEND)  # the host's, before the stage's


class Event(Protocol):
    """A torch.cuda.Event."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this one to another one; both have passed."""


def timing_event() -> Event:
    return torch.cuda.Event(enable_timing=True)


@dataclass(slots=True)
class Turn:
    """What the device does from the end of one turn of the stage to that of the next."""

    issued_ns: int  # when the host began to give it work, on perf_counter_ns's clock
    idle: list[int] | None  # what the host had done since the turn before, by phase, if the device had nothing to do
    marks: list[tuple[Phase, Event]] = field(default_factory=list)  # what has ended, and where; REPORT: the gap
    rows: int = 0
    useful: int = 0


Told = Callable[[Turn, Sequence[int]], None]  # a turn and the device's nanoseconds by phase; REPORT: the gap


def untold(turn: Turn, ns: Sequence[int]) -> None:
    """Nobody wants to know."""


class DeviceClock:
    """See `spmd.trace.host_clock.Clock`. Made and used in the loop's thread, on its current stream."""

    def __init__(self, make_event: Callable[[], Event] = timing_event) -> None:
        self.host = HostClock()
        self.make_event = make_event
        self.told: Told = untold  # is told of every turn, in order, once its device has done it
        self.free: list[Event] = []

    def start(self) -> None:
        self.pending: deque[Turn] = deque()  # not known to be done, oldest first
        self.settling: Turn | None = None  # the latest one, when tokens were last committed
        self.ledger = Ledger()
        self.rows = self.useful = 0
        self.last = self._recorded()  # the last event that was read
        self.last.synchronize()
        self.host.start()
        self._seen = self.host.ledger.ns.copy()

    def end(self, phase: Phase, waited: float | None = None) -> None:
        self.host.end(phase, waited)
        if phase is Phase.REPORT:
            self._begin_turn()
        elif phase in ON_DEVICE:
            self._mark(phase)

    def ran(self, rows: int, useful: int) -> None:
        self.host.ran(rows, useful)
        self.rows += rows
        self.useful += useful
        turn = self.pending[-1]
        turn.rows, turn.useful = rows, useful
        self._mark(Phase.FORWARD)

    def settle(self) -> None:
        if self.pending:
            self.settling = self.pending[-1]
        else:
            self.ledger.settle()

    def stop(self) -> None:
        self.host.stop()
        for _ in range(2):  # the second one begins when the device has nothing left, as one at the start
            self._begin_turn()
            self.pending[-1].marks[-1][1].synchronize()
        self._read()

    def account(self, wall: float) -> Account:
        return self.ledger.account(wall)

    def _begin_turn(self) -> None:
        self._read()
        idle = None
        if not self.pending:
            idle = [now - before for before, now in zip(self._seen, self.host.ledger.ns, strict=True)]
        self._seen = self.host.ledger.ns.copy()
        self.pending.append(Turn(perf_counter_ns(), idle))
        self._mark(Phase.REPORT)

    def _mark(self, phase: Phase) -> None:
        self.pending[-1].marks.append((phase, self._recorded()))

    def _recorded(self) -> Event:
        event = self.free.pop() if self.free else self.make_event()
        event.record()
        return event

    def _read(self) -> None:
        """Take in the turns whose last event has passed; events pass in the order in which they were recorded."""
        while self.pending and self.pending[0].marks[-1][1].query():
            self._take(self.pending.popleft())

    def _take(self, turn: Turn) -> None:
        spent = [0] * NUM_PHASES
        for phase, event in turn.marks:
            spent[phase] = int(1e6 * self.last.elapsed_time(event))
            self.free.append(self.last)
            self.last = event
        self.told(turn, spent)
        self._count_gap(spent[Phase.REPORT], turn.idle)
        self.ledger.forward(spent[Phase.FORWARD], turn.rows, turn.useful)
        for phase in ON_DEVICE:
            self.ledger.ns[phase] += spent[phase]
        if turn is self.settling:
            self.ledger.settle()

    def _count_gap(self, ns: int, idle: Sequence[int] | None) -> None:
        ledger = self.ledger.ns
        for phase in BACKWARD if idle else ():
            assert idle is not None
            part = min(ns, idle[phase])
            ledger[phase] += part
            ns -= part
        ledger[Phase.INPUTS] += ns
