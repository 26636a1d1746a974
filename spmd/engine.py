"""The loop every rank runs, tick by tick: commit, control, feed, schedule, run, return.

Nothing here asks another rank what to do. Plans are equal on all ranks of a replica because the schedulers are, and
they stay so because the only news, sampled tokens and which requests ended, arrive in one packet a tick. Replicas
tell each other their loads, and from equal loads all ranks draw equal conclusions.
"""

from collections import deque
from collections.abc import Callable
from itertools import count
from time import perf_counter

from spmd.api.rows import Job
from spmd.api.source import Skipped, Source
from spmd.leader import Leader
from spmd.parallel.load import LoadExchange
from spmd.parallel.packet import NO_DIGESTS, Packet, PacketWire
from spmd.sampling.sampler import Sampled
from spmd.schedule.balance import EXHAUSTED, Balance, Load
from spmd.schedule.digests import DigestChain, Diverged, first_difference
from spmd.schedule.plan import Plan
from spmd.schedule.scheduler import Scheduler
from spmd.signals import Stop
from spmd.stage.stage import Stage


class Engine:
    """One rank of a replica. `source` is the same list of rows on every rank of every replica."""

    def __init__(
        self,
        scheduler: Scheduler,
        stage: Stage,
        packets: PacketWire,
        source: Source,
        balance: Balance,
        leader: Leader | None,
        exchange: LoadExchange | None = None,
        lockstep: bool = False,
        stop: Stop | None = None,
        trail: DigestChain | None = None,
        watch: Callable[["Engine"], None] | None = None,
    ) -> None:
        """`leader` is None on all ranks of a replica but one, `exchange` where there is one replica.

        `lockstep`: replicas share experts, so each tick they agree on the rows of a forward before it; the exchange
        must have no lag. `stop`: where the leader finds that the run is to stop early. `trail`: the replica's ranks
        compare at each tick what they did; all have one or none has. `watch` is called after every tick: progress,
        traces, tests.
        """
        self.scheduler = scheduler
        self.stage = stage
        self.packets = packets
        self.source = source
        self.balance = balance
        self.leader = leader
        self.exchange = exchange
        self.lockstep = lockstep
        self.told: list[Load] | None = None  # in lockstep, what was told in the last tick
        self.stop = stop or Stop()
        self.trail = trail
        self.watch = watch
        self.ring: deque[Plan] = deque()  # plans in flight, oldest first
        self.unjudged: deque[tuple[Plan, Sampled | None]] = deque()  # the latest of these; on the leader alone
        self.exhausted = False
        self.rows = 0  # taken from the source for this replica
        self.passed = 0  # rows of the source gone through, for any replica
        self.output_tokens = 0
        self.told_tokens = 0  # of these, in loads
        self.stopped = 0  # who asked to stop, as the leader passed it on; 0: nobody
        self.last_finish = 0.0  # on perf_counter's clock, on the leader; 0: none yet

    def run(self) -> None:
        """Tick until every row is answered, or somebody asks to stop; then what is in flight is still committed.

        Raises:
            Diverged: this rank and the leader of its replica, or two replicas, are no longer alike.
        """
        for tick in count():
            self.tick(tick)
            if self.watch:
                self.watch(self)
            if self.over:
                break
        stopped = self.balance.stopped if self.exchange else self.stopped  # as all ranks know it
        while self.ring:
            self._commit(self.ring.popleft())
        self.stopped = stopped
        self.stage.drain()
        if self.exchange:
            self.exchange.drain()

    @property
    def over(self) -> bool:
        """Whether no replica has anything left to do, or all stop early; on all of them after the same tick."""
        if self.exchange:
            return self.balance.over or self.balance.stopped > 0
        return self.stopped > 0 or (self.exhausted and not self.scheduler.num_requests)

    def tick(self, tick: int) -> None:
        scheduler = self.scheduler
        if len(self.ring) == scheduler.limits.slots + scheduler.limits.lookahead:
            self._commit(self.ring.popleft())
        if self.exchange:
            self.balance.see(self.told if self.lockstep else self._listen(self.exchange))
        self._feed()
        plan = scheduler.schedule(tick, self.balance.admits(tick, scheduler.num_running, len(scheduler.waiting)))
        if self.trail:
            plan.digests = self.trail.plan(plan)
        rows = None
        if self.exchange:
            self.exchange.launch(self._load(plan))
            if self.lockstep:
                self.told = self._listen(self.exchange)
                rows = max(load.rows for load in self.told or ())
        sampled = self.stage.run(plan, rows)
        self.ring.append(plan)
        if not self.leader:
            self.packets.post()
        else:
            self.unjudged.append((plan, sampled))
            if len(self.unjudged) > self.stage.result_lag:
                self._judge(self.leader)

    def _judge(self, leader: Leader) -> None:
        """Post the packet of the oldest plan that has none."""
        plan, sampled = self.unjudged.popleft()
        tokens, finished = leader.judge(plan, sampled) if sampled else ([], [])
        self.packets.post(Packet(tokens, finished, self.stop.asked, plan.digests or NO_DIGESTS))

    def _commit(self, plan: Plan) -> None:
        if self.leader and self.unjudged and self.unjudged[0][0] is plan:
            self._judge(self.leader)
        packet = self.packets.take()
        if self.trail:
            if difference := first_difference(plan.digests, packet.digests):
                raise Diverged(f"tick {plan.tick}: {difference} differ from the leader's")
            self.trail.commit(packet.tokens, packet.finished)
        self.stopped = self.stopped or packet.stop
        self.output_tokens += [request.finished for request in plan.sampled].count(False)
        done = self.scheduler.commit(plan, packet.tokens, packet.finished)
        if self.leader and done:
            for request in done:
                self.leader.finish(request)
            self.last_finish = perf_counter()

    @staticmethod
    def _listen(exchange: LoadExchange) -> list[Load] | None:
        loads = exchange.take()
        return [Load(*load) for load in loads] if loads else None

    def _feed(self) -> None:
        """Go on in the list as far as replicas need rows, and take those that are this one's."""
        while not self.exhausted and (own := self.balance.next(self.scheduler.num_requests)) is not None:
            row = self.source.take(own)
            if row is None:
                self.exhausted = True
                break
            self.passed += 1
            if isinstance(row, Skipped):
                continue
            self.rows += 1
            if isinstance(row, Job):
                for request in row.requests:
                    self.scheduler.add(request)
            if self.leader:
                self.leader.take(row)

    def _load(self, plan: Plan) -> Load:
        """What the other replicas are told about this tick."""
        scheduler = self.scheduler
        tokens, self.told_tokens = self.output_tokens - self.told_tokens, self.output_tokens
        return Load(
            running=scheduler.num_running,
            waiting=len(scheduler.waiting),
            free_blocks=scheduler.pool.num_free,
            prompt_tokens=plan.num_prompt_tokens,
            decode_rows=plan.num_decodes,
            rows=plan.num_rows,
            claimed=self.rows,
            flags=EXHAUSTED if self.exhausted else 0,
            stop=self.stopped,
            passed=self.passed,
            tokens=tokens,
        )
