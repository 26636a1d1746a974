"""The token packet: what the leader of a replica tells the others about a plan. Fixed size, one a tick, no exceptions.

`[stop, count, digest, ..., token, ..., verdict, ...]`: whether to stop, the leader's digests of the plan, the sampled
tokens in the plan's order, and for each whether its request ends.
"""

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from spmd.parallel.transfer import on_host
from spmd.schedule.digests import FIELDS, NO_DIGESTS, Digests

HEADER = 2 + len(FIELDS)


class Packet(NamedTuple):
    """News of one plan."""

    tokens: list[int]
    finished: list[bool]
    stop: int = 0  # who asks the run to stop (`spmd.signals`); 0: nobody
    digests: Digests = NO_DIGESTS


class PacketQueue:
    """Packets of a leader that is the only rank of its replica: nothing travels."""

    def __init__(self) -> None:
        self._kept: deque[Packet] = deque()

    def post(self, packet: Packet) -> None:
        self._kept.append(packet)

    def receive(self) -> Packet:
        return self._kept.popleft()


class PacketWire:
    """Broadcasts packets from the leader, several in flight, delivered in order."""

    def __init__(self, group: ProcessGroup, leader: int, max_samples: int) -> None:
        """`group`: the replica's CPU group; `leader`: a rank of it; `max_samples`: tokens of the largest plan."""
        self.group = group
        self.leader = leader
        self.max_samples = max_samples
        self._pending: deque[tuple[dist.Work | None, Tensor]] = deque()

    def post(self, packet: Packet | None = None) -> None:
        """Start this tick's broadcast: on the leader of `packet`, elsewhere to receive one."""
        buffer = torch.zeros(HEADER + 2 * self.max_samples, dtype=torch.int64)
        if packet is not None:
            content = [packet.stop, len(packet.tokens), *packet.digests, *packet.tokens, *packet.finished]
            buffer[: len(content)] = on_host(content, torch.int64)
        self._pending.append((dist.broadcast(buffer, self.leader, group=self.group, async_op=True), buffer))

    def receive(self) -> Packet:
        """The oldest packet not received yet. Waits until it is there."""
        work, buffer = self._pending.popleft()
        if work is not None:
            work.wait()
        count = int(buffer[1])
        stop, _, *content = buffer[: HEADER + 2 * count].tolist()
        ends = len(FIELDS) + count
        digests, tokens, finished = content[: len(FIELDS)], content[len(FIELDS) : ends], content[ends:]
        return Packet(tokens, [bool(verdict) for verdict in finished], stop, tuple(digests))
