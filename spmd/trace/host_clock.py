"""The loop's own time, cut into phases. Where the loop's thread computes, on a CPU, that is all there is to know."""

from collections.abc import Sequence
from time import perf_counter_ns
from typing import Protocol

from spmd.trace.account import Account, Ledger
from spmd.trace.phases import Phase

COUNTERS = {Phase.COMMIT: 0, Phase.RETURN: 0, Phase.LISTEN: 1, Phase.REPORT: 1, Phase.FEED: 2}  # who tells of waits
HOST = (Phase.COMMIT, Phase.LISTEN, Phase.FEED, Phase.SCHEDULE, Phase.REPORT, Phase.RETURN)  # beside the stage


class Clock(Protocol):
    """What the loop and its stage tell the time to: a HostClock, or a DeviceClock on GPUs."""

    rows: int  # of all forwards so far, padding included
    useful: int  # of these, tokens of requests

    @property
    def host(self) -> "HostClock":
        """That of the loop's thread."""

    def start(self) -> None:
        """A run begins: count from nought."""

    def end(self, phase: Phase, waited: float | None = None) -> None:
        """The running phase ends, and was this one.

        `waited`: seconds waited in this phase and in others, as one counter has them since the run began; what came
        to it counts as the wait that stands before the phase.
        """

    def ran(self, rows: int, useful: int) -> None:
        """FORWARD ends, which ran so many rows; `useful` of them were tokens of requests."""

    def settle(self) -> None:
        """Tokens were committed; see `Ledger.settle`."""

    def stop(self) -> None:
        """The loop is over; waits until all is known."""

    def account(self, wall: float) -> Account:
        """Of a run of `wall` seconds that is stopped."""


class HostClock:
    """At every moment of a run one phase goes on; `ledger` has the nanoseconds of those that have ended."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.ledger = Ledger()
        self.rows = self.useful = 0
        self._counted = [0.0] * 3
        self.since = perf_counter_ns()  # when the running phase began

    @property
    def host(self) -> "HostClock":
        return self

    def end(self, phase: Phase, waited: float | None = None) -> None:
        now = perf_counter_ns()
        spent, self.since = now - self.since, now
        if waited is not None:
            spent -= self._wait_of(phase, waited, spent)
        self.ledger.ns[phase] += spent

    def ran(self, rows: int, useful: int) -> None:
        now = perf_counter_ns()
        self.ledger.forward(now - self.since, rows, useful)
        self.since = now
        self.rows += rows
        self.useful += useful

    def settle(self) -> None:
        self.ledger.settle()

    def stop(self) -> None:
        self.end(Phase.WATCH)

    def account(self, wall: float) -> Account:
        return self.ledger.account(wall)

    @property
    def python_ns(self) -> int:
        """Nanoseconds so far of what a tick does beside running its stage, without waiting for anybody."""
        return total(self.ledger.ns, HOST)

    def _wait_of(self, phase: Phase, waited: float, spent: int) -> int:
        """Count what of `spent` nanoseconds was waiting, and return it."""
        counter = COUNTERS[phase]
        ns = min(int(1e9 * (waited - self._counted[counter])), spent)
        self._counted[counter] = waited
        self.ledger.ns[phase - 1] += ns
        return ns


def total(ns: Sequence[int], phases: Sequence[Phase]) -> int:
    return sum(ns[phase] for phase in phases)
