"""Where sampled tokens go: judged by the leader of a replica, sent to its other ranks, in one packet for each plan."""

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

from spmd.api.rows import BadRow, Job
from spmd.leader import Leader
from spmd.parallel.packet import Packet, PacketWire
from spmd.report.metrics import Metrics
from spmd.sampling.sampler import Sampled
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request
from spmd.signals import Stop


class Results(Protocol):
    """What one rank does with what was sampled. `send` and `receive` are called once for each plan, in their order."""

    def open(self, row: Job | BadRow) -> None:
        """A row of this replica came in."""

    def send(self, plan: Plan, sampled: Sampled | None) -> None:
        """A plan was run. Its packet leaves now or later, but for a `receive` of it at the latest."""

    def receive(self, plan: Plan) -> Packet:
        """The packet of the oldest plan of which none was received; waits until it is there."""

    def finish(self, requests: Sequence[Request]) -> None:
        """The last tokens of these are committed."""

    def figures(self, started: float, ended: float) -> Metrics:
        """What was counted in a run between two moments on perf_counter's clock."""


class Packets(Protocol):
    """How a leader's packets travel: a PacketWire, or a PacketQueue where there is nobody else."""

    def post(self, packet: Packet) -> None: ...

    def receive(self) -> Packet: ...


class Judged:
    """The leader's: decides which requests have ended, and says so, and whether to stop, to all."""

    def __init__(self, leader: Leader, packets: Packets, stop: Stop, lag: int) -> None:
        """`lag`: ticks for which samples stay where they are before they are judged, unless they are asked for."""
        self.leader = leader
        self.packets = packets
        self.stop = stop
        self.lag = lag
        self.unjudged: deque[tuple[Plan, Sampled | None]] = deque()  # the latest plans
        self.last_finish = 0.0  # on perf_counter's clock; 0: none yet

    def open(self, row: Job | BadRow) -> None:
        self.leader.open(row)

    def send(self, plan: Plan, sampled: Sampled | None) -> None:
        self.unjudged.append((plan, sampled))
        if len(self.unjudged) > self.lag:
            self._judge()

    def receive(self, plan: Plan) -> Packet:
        if self.unjudged and self.unjudged[0][0] is plan:
            self._judge()
        return self.packets.receive()

    def finish(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self.leader.finish(request)
        if requests:
            self.last_finish = perf_counter()

    def figures(self, started: float, ended: float) -> Metrics:
        metrics = self.leader.metrics
        metrics.replicas, metrics.idle_seconds = 1, ended - max(started, self.last_finish)
        return metrics

    def _judge(self) -> None:
        """Post the packet of the oldest plan that has none."""
        plan, sampled = self.unjudged.popleft()
        tokens, finished = self.leader.judge(plan, sampled) if sampled else ([], [])
        self.packets.post(Packet(tokens, finished, self.stop.asked, plan.digests))


class Followed:
    """That of all other ranks: what the leader says."""

    def __init__(self, packets: PacketWire) -> None:
        self.packets = packets

    def open(self, row: Job | BadRow) -> None: ...

    def send(self, plan: Plan, sampled: Sampled | None) -> None:
        self.packets.post()

    def receive(self, plan: Plan) -> Packet:
        return self.packets.receive()

    def finish(self, requests: Sequence[Request]) -> None: ...

    def figures(self, started: float, ended: float) -> Metrics:
        return Metrics()
