"""The load exchange: every replica learns every replica's load, some ticks late. Fixed size, one a tick, no exceptions.

Ranks of the same stage and tensor rank exchange with one another, so nobody has to pass anything on.
"""

from collections import deque
from collections.abc import Sequence
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd.parallel.transfer import on_host


class LoadExchange:
    """All-gathers loads over the replicas, `lag` + 1 of them in flight at most."""

    def __init__(self, group: ProcessGroup, dp: int, lag: int) -> None:
        """`group`: a CPU group of one rank of each of the `dp` replicas, in their order."""
        self.group = group
        self.dp = dp
        self.lag = lag
        self.count = 0  # launched; equal on all ranks at the end
        self.seconds = 0.0  # that this rank spent in launching and waiting
        self._pending: deque[tuple[dist.Work | None, Tensor]] = deque()

    def launch(self, load: Sequence[int]) -> None:
        """Start the exchange of this tick; int32 numbers, as many on every rank."""
        started = perf_counter()
        loads = torch.empty(self.dp, len(load), dtype=torch.int32)
        own = on_host(load, torch.int32)
        work = dist.all_gather(list(loads), own, group=self.group, async_op=True)
        self._pending.append((work, loads))
        self.count += 1
        self.seconds += perf_counter() - started

    def receive(self) -> list[list[int]] | None:
        """Loads by replica of the exchange `lag` launches before the latest one; None as long as there is none.

        Waits until all replicas have launched it. To be called at most once a launch.
        """
        if len(self._pending) <= self.lag:
            return None
        started = perf_counter()
        work, loads = self._pending.popleft()
        if work is not None:
            work.wait()
        received: list[list[int]] = loads.tolist()
        self.seconds += perf_counter() - started
        return received

    def drain(self) -> None:
        """Wait until all that was launched is done."""
        while self._pending:
            work, _ = self._pending.popleft()
            if work is not None:
                work.wait()
