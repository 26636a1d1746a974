"""Why a run can't go on: from what is known of each rank to the one message that people read. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from spmd.guard.recorder import Trace
from spmd.schedule.digests import WHAT, Digests, first_difference


@dataclass
class RankStatus:
    """What is known of one rank."""

    rank: int
    place: str  # role, host and process, for people
    silent: float  # seconds since its last sign of life
    still: float  # seconds for which its loop has neither ended a tick nor computed, as it said itself
    tick: int = -1  # its last
    trace: Trace = field(default_factory=dict)
    done: bool = False  # its loop has ended well

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.place})"


@dataclass(frozen=True)
class Verdict:
    message: str
    lost: tuple[int, ...] = ()  # ranks that give no sign of life


def judge(
    sights: Sequence[RankStatus], replicas: Sequence[Sequence[int]], silence: float, stillness: float
) -> Verdict | None:
    """What is wrong, the cause before its symptoms; None if all is well or somebody still computes.

    Args:
        sights: of those ranks that are looked at.
        replicas: ranks of each replica.
        silence: seconds without a sign of life that make a rank a lost one.
        stillness: seconds in which nobody has moved that make it a standstill.
    """
    lost = [sight for sight in sights if sight.silent > silence and not sight.done]
    ranks = tuple(sight.rank for sight in lost)
    for replica in replicas:
        if difference := _difference([sight for sight in sights if sight.rank in replica]):
            return Verdict(difference, ranks)
    if lost:
        told = (f"{sight} gave no sign of life for {sight.silent:.0f} s, at tick {sight.tick}" for sight in lost)
        return Verdict("; ".join(told) + ": killed, out of memory, stopped, or its host is gone", ranks)
    working = [sight for sight in sights if not sight.done]
    if working and min(sight.still for sight in working) > stillness:
        ticks = ", ".join(f"{sight.rank}: {sight.tick}" for sight in working)
        since = min(sight.still for sight in working)
        return Verdict(f"no rank has moved for {since:.0f} s, nor do their plans differ; last ticks by rank: {ticks}")
    return None


def _difference(sights: Sequence[RankStatus]) -> str | None:
    """The first tick at which ranks of one replica differ, in what, and who differs from most others."""
    for tick in sorted({tick for sight in sights for tick in sight.trace}):
        seen = [sight for sight in sights if tick in sight.trace]
        digests = [sight.trace[tick] for sight in seen]
        if len(set(digests)) > 1:
            return _told(tick, seen, digests)
    return None


def _told(tick: int, sights: list[RankStatus], digests: list[Digests]) -> str:
    usual, times = Counter(digests).most_common(1)[0]
    odd = [(sight, digest) for sight, digest in zip(sights, digests, strict=True) if digest != usual]
    field = first_difference(odd[0][1], usual)
    assert field is not None
    others = [sight for sight, digest in zip(sights, digests, strict=True) if digest == usual]
    if times == len(odd):  # as many on either side: nobody knows who is right
        who = " and ".join(map(str, [*others, *(sight for sight, _ in odd)])) + " differ"
    else:
        who = ", ".join(str(sight) for sight, _ in odd) + f" differs from the other {times} of its replica"
    return f"ranks have drifted apart: at tick {tick} {who}, first in {field!r}, {WHAT[field]}"
