"""The token packet: what the leader of a replica tells the others about a plan. Fixed size, one a tick, no exceptions.

`[count, token, ..., verdict, ...]`: the sampled tokens in the plan's order, and for each whether its request ends.
"""

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd.model.transfer import on_host


class PacketWire:
    """Broadcasts packets from the leader, several in flight, delivered in order."""

    def __init__(self, group: ProcessGroup | None, leader: int, is_leader: bool, max_samples: int) -> None:
        """`group`: the replica's CPU group, None if the leader is alone. `max_samples`: tokens of the largest plan."""
        self.group = group
        self.leader = leader
        self.is_leader = is_leader
        self.max_samples = max_samples
        self._pending: deque[tuple[dist.Work | None, Tensor]] = deque()
        self._kept: deque[tuple[list[int], list[bool]]] = deque()  # by a leader that is alone

    def post(self, tokens: Sequence[int], finished: Sequence[bool]) -> None:
        """Start this tick's broadcast. What is passed counts on the leader alone."""
        if self.group is None:
            self._kept.append(([*tokens], [*finished]))
            return
        packet = torch.zeros(1 + 2 * self.max_samples, dtype=torch.int64)
        if self.is_leader:
            count = len(tokens)
            packet[: 1 + 2 * count] = on_host([count, *tokens, *finished], torch.int64)
        self._pending.append((dist.broadcast(packet, self.leader, group=self.group, async_op=True), packet))

    def take(self) -> tuple[list[int], list[bool]]:
        """The oldest packet not taken yet: its tokens and verdicts. Waits until it is there."""
        if self.group is None:
            return self._kept.popleft()
        work, packet = self._pending.popleft()
        if work is not None:
            work.wait()
        count = int(packet[0])
        content = packet[1 : 1 + 2 * count].tolist()
        return content[:count], [bool(verdict) for verdict in content[count:]]
