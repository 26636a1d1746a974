"""Why a run can't go on: from what is known of each rank to the one message that people read. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from spmd.guard.recorder import Trace
from spmd.schedule.digests import WHAT, Digests, first_difference


@dataclass
class RankStatus:
    """What is known of one rank, by the one that looks at it."""

    rank: int
    place: str  # role, host and process, for people
    silent: float  # seconds since its last sign of life
    stalled: float  # seconds for which its loop had neither ended a tick nor computed, as its last sign of life says
    tick: int = -1  # the last that it planned
    trace: Trace = field(default_factory=dict)  # what it did in the last ticks
    done: bool = False  # its loop has ended well

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})"


@dataclass(frozen=True)
class Verdict:
    message: str
    lost: tuple[int, ...] = ()  # ranks that give no sign of life


def judge(
    statuses: Sequence[RankStatus], replicas: Sequence[Sequence[int]], silence: float, stall: float
) -> Verdict | None:
    """What is wrong, the cause before its symptoms; None if all is well or somebody still computes.

    Args:
        statuses: of those ranks that are looked at.
        replicas: ranks of each replica.
        silence: seconds without a sign of life that make a rank a lost one.
        stall: seconds in which nobody has moved that make it a standstill.
    """
    lost = [status for status in statuses if status.silent > silence and not status.done]
    ranks = tuple(status.rank for status in lost)
    for replica in replicas:
        if difference := _difference([status for status in statuses if status.rank in replica]):
            return Verdict(difference, ranks)
    if lost:
        silences = (
            f"{status} gave no sign of life for {status.silent:.0f} s, at tick {status.tick}" for status in lost
        )
        return Verdict("; ".join(silences) + ": killed, out of memory, stopped, or its host is gone", ranks)
    working = [status for status in statuses if not status.done]
    since = min((status.stalled for status in working), default=0.0)
    if since > stall:
        ticks = ", ".join(f"{status.rank}: {status.tick}" for status in working)
        return Verdict(f"no rank has moved for {since:.0f} s, nor do their plans differ; last ticks by rank: {ticks}")
    return None


def _difference(statuses: Sequence[RankStatus]) -> str | None:
    """The first tick at which ranks of one replica differ, in what, and who differs from most others."""
    for tick in sorted({tick for status in statuses for tick in status.trace}):
        seen = [status for status in statuses if tick in status.trace]
        digests = [status.trace[tick] for status in seen]
        if len(set(digests)) > 1:
            return _describe(tick, seen, digests)
    return None


def _describe(tick: int, statuses: list[RankStatus], digests: list[Digests]) -> str:
    usual, times = Counter(digests).most_common(1)[0]
    odd = [(status, digest) for status, digest in zip(statuses, digests, strict=True) if digest != usual]
    field = first_difference(odd[0][1], usual)
    assert field is not None
    others = [status for status, digest in zip(statuses, digests, strict=True) if digest == usual]
    if times == len(odd):  # as many on either side: nobody knows who is right
        who = " and ".join(map(str, [*others, *(status for status, _ in odd)])) + " differ"
    else:
        who = ", ".join(str(status) for status, _ in odd) + f" differs from the other {times} of its replica"
    return f"ranks have drifted apart: at tick {tick} {who}, first in {field!r}, {WHAT[field]}"
