"""The hidden-states wire: stage s to stage s+1, same tensor rank. Shapes come from the plan, so no metadata travels.

Gloo delivers a message only to a receiver with its tag, which is the number of rows: stages that have drifted apart
wait until the guard finds out, where a message of another size would abort the process.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd.topology import Topology


class HiddenChannel:
    """Sends and receives hidden states `[rows, hidden]` between neighbouring stages."""

    def __init__(
        self,
        topology: Topology,
        group: ProcessGroup | None,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        slots: int,
    ) -> None:
        """`slots`: micro-batches in flight, so many buffers may be on their way at once."""
        self.topology = topology
        self.group = group
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.device = device
        self.slots = slots
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def receive(self, rows: int) -> Tensor:
        """Hidden states of the previous stage's current plan, `[rows, hidden]`."""
        hidden = torch.empty(rows, self.hidden_size, dtype=self.dtype, device=self.device)
        work = dist.irecv(hidden, self.topology.previous_stage, group=self.group, tag=rows)
        assert work is not None
        work.wait()
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Start sending. The buffer is kept until it has left: isend reads it after this returns."""
        work = dist.isend(hidden, self.topology.next_stage, group=self.group, tag=len(hidden))
        assert work is not None
        self._sending.append((work, hidden))
        while len(self._sending) > self.slots:
            self._sending.popleft()[0].wait()

    def drain(self) -> None:
        """Wait until everything has left."""
        while self._sending:
            self._sending.popleft()[0].wait()
