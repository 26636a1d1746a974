"""The loop every rank runs, tick by tick: commit, feed, schedule, run, return.

Nothing here asks another rank what to do. Plans are equal on all ranks of a replica because the schedulers are, and
they stay so because the only news, sampled tokens and which requests ended, arrive in one packet a tick.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import count

from spmd.io.rows import BadRow, Job
from spmd.leader import Leader
from spmd.model.sampler import Sampled
from spmd.model.stage import Stage
from spmd.parallel.packet import PacketWire
from spmd.schedule.plan import Plan
from spmd.schedule.scheduler import Scheduler


class Engine:
    """One rank of a replica. `source` yields the same rows on all of them; `leader` is None on all but one."""

    def __init__(
        self,
        scheduler: Scheduler,
        stage: Stage,
        packets: PacketWire,
        source: Iterator[Job | BadRow],
        leader: Leader | None,
        watch: Callable[["Engine"], None] | None = None,
    ) -> None:
        """`watch` is called after every tick: progress, traces, tests."""
        self.scheduler = scheduler
        self.stage = stage
        self.packets = packets
        self.source = source
        self.leader = leader
        self.watch = watch
        self.ring: deque[Plan] = deque()  # plans in flight, oldest first
        self.unjudged: deque[tuple[Plan, Sampled | None]] = deque()  # the latest of these; on the leader alone
        self.exhausted = False
        self.rows = 0  # taken from the source
        self.output_tokens = 0

    def run(self) -> None:
        """Tick until every row is answered."""
        for tick in count():
            self.tick(tick)
            if self.watch:
                self.watch(self)
            if self.exhausted and not self.scheduler.num_requests:
                break
        while self.ring:
            self._commit(self.ring.popleft())
        self.stage.drain()

    def tick(self, tick: int) -> None:
        limits = self.scheduler.limits
        if len(self.ring) == limits.slots + limits.lookahead:
            self._commit(self.ring.popleft())
        self._feed()
        plan = self.scheduler.schedule(tick)
        sampled = self.stage.run(plan)
        self.ring.append(plan)
        if not self.leader:
            self.packets.post((), ())
        else:
            self.unjudged.append((plan, sampled))
            if len(self.unjudged) > self.stage.defer:
                self._judge(self.leader)

    def _judge(self, leader: Leader) -> None:
        """Post the packet of the oldest plan that has none."""
        plan, sampled = self.unjudged.popleft()
        self.packets.post(*leader.judge(plan, sampled) if sampled else ((), ()))

    def _commit(self, plan: Plan) -> None:
        if self.leader and self.unjudged and self.unjudged[0][0] is plan:
            self._judge(self.leader)
        tokens, finished = self.packets.take()
        self.output_tokens += [request.finished for request in plan.sampled].count(False)
        for request in self.scheduler.commit(plan, tokens, finished):
            if self.leader:
                self.leader.finish(request)

    def _feed(self) -> None:
        """Fill the seats from the source; by priority, look as many rows further ahead as there are seats."""
        limits = self.scheduler.limits
        wanted = limits.max_num_seqs * (2 if limits.by_priority else 1)
        while not self.exhausted and self.scheduler.num_requests < wanted:
            row = next(self.source, None)
            if row is None:
                self.exhausted = True
                break
            self.rows += 1
            if isinstance(row, Job):
                for request in row.requests:
                    self.scheduler.add(request)
            if self.leader:
                self.leader.take(row)
