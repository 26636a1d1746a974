"""How far the clocks of ranks are apart, so that their traces can be laid on one another.

perf_counter is a clock of the machine (CLOCK_MONOTONIC): ranks on one host share it. A rank on another host than rank
0's asks that for the time, several times. The answer was given between asking and hearing it, so it is taken for the
middle, and half of the round trip is how wrong that can be; the shortest of the round trips counts.

Clocks that time daemons keep at one rate stay as far apart as they are at the start; others drift by up to some
milliseconds an hour.
"""

from collections.abc import Sequence
from time import perf_counter_ns
from typing import NamedTuple

import torch
import torch.distributed as dist

ROUND_TRIPS = 20


class Offset(NamedTuple):
    """What to add to a rank's perf_counter to get rank 0's, in nanoseconds, and by how much it may be wrong."""

    ns: int
    error_ns: int


def measure(rank: int, hosts: Sequence[str]) -> Offset:
    """This rank's offset. All ranks of the default process group must call it; `hosts` has the host of each."""
    offset = Offset(0, 0)
    for other, host in enumerate(hosts):
        if host != hosts[0] and rank == 0:
            _answer(other)
        elif host != hosts[0] and rank == other:
            offset = min((_ask() for _ in range(ROUND_TRIPS)), key=lambda each: each.error_ns)
    return offset


def _ask() -> Offset:
    told = torch.zeros(1, dtype=torch.int64)
    asked = perf_counter_ns()
    dist.send(told, 0)
    dist.recv(told, 0)
    heard = perf_counter_ns()
    return Offset(int(told) - (asked + heard) // 2, (heard - asked + 1) // 2)


def _answer(rank: int) -> None:
    told = torch.zeros(1, dtype=torch.int64)
    for _ in range(ROUND_TRIPS):
        dist.recv(told, rank)
        told[0] = perf_counter_ns()
        dist.send(told, rank)
