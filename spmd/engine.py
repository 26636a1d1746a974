"""The loop every rank runs, tick by tick: commit, control, feed, schedule, run, return.

Nothing here asks another rank what to do. Plans are equal on all ranks of a replica because the schedulers are, and
they stay so because the only news, sampled tokens and which requests ended, arrive in one packet a tick. Replicas
report their loads to each other, and from equal loads all ranks draw equal conclusions.

What differs between ranks and topologies is in what an engine is given: a stage, a source of rows, its view of the
replicas and of the results. Each is a Protocol, so a simulation can stand in for any of them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

from spmd.api.rows import BadRow, Job
from spmd.api.source import NotYet, Skipped, Source, num_requests
from spmd.parallel.packet import Packet
from spmd.report.histogram import Histogram
from spmd.report.metrics import Metrics
from spmd.sampling.sampler import Sampled
from spmd.schedule.balance import EXHAUSTED, Load
from spmd.schedule.digests import DigestChain, Undigested
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request
from spmd.schedule.scheduler import Scheduler
from spmd.trace.host_clock import Clock
from spmd.trace.phases import Phase


class Stage(Protocol):
    """What runs plans: `spmd.stage.stage`, or a simulation."""

    def run(self, plan: Plan, shared_rows: int | None) -> Sampled | None:
        """Run a plan; on the leader returns a token for each of `plan.sampled`, None if there are none.

        `shared_rows`: the most rows of any replica's plan in this tick where all share a forward, else None.
        """

    def drain(self) -> None:
        """Wait until all that was sent has left."""


class Replicas(Protocol):
    """One replica's view of all. In each tick `listen`, `next_row`, `admits` and `report` are called in this order."""

    loads: Sequence[Load]  # the latest known of all replicas; empty: none yet
    tokens: int  # output tokens of all replicas, as far as loads tell
    stopped: int  # who asked the run to stop; known at the same tick everywhere; 0: nobody
    over: bool  # whether the tick that was reported last is the last one; true at the same tick everywhere

    def listen(self) -> None:
        """A tick begins: take in what the others reported.

        Raises:
            Diverged: replicas share one list and yet aren't at the same place in it.
        """

    def next_row(self, held: int) -> bool | None:
        """Whether the next row is this replica's, which has `held` requests; None: leave it for a later tick."""

    def took(self, requests: int) -> None:
        """The row that `next_row` just spoke of has so many requests, if not one; 0: it isn't there yet."""

    def admits(self, tick: int, running: int, waiting: int) -> bool:
        """Whether waiting requests may be seated in this tick."""

    def report(self, load: Load) -> int | None:
        """Say how this replica stands, once its plan of this tick is made.

        Returns:
            The most rows that any replica has in this tick where all share a forward, else None.
        """

    def drain(self) -> None:
        """The run is over: wait until all that was sent has left."""

    @property
    def frozen_ticks(self) -> int:
        """Ticks in which requests were held back although there were seats; equal on all ranks of a replica."""

    @property
    def mixed_ticks(self) -> int:
        """Ticks in which one replica ran prompts while another only decoded."""

    @property
    def exchanges(self) -> int:
        """Loads that this rank has sent."""

    @property
    def exchange_seconds(self) -> float:
        """Seconds spent with them."""


class Results(Protocol):
    """What one rank does with what was sampled. `send` and `receive` are called once for each plan, in their order."""

    @property
    def waited(self) -> float:
        """Seconds so far for samples and packets."""

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


Watch = Callable[["Engine"], None]


def unwatched(engine: "Engine") -> None:
    """Nobody looks."""


def all_of(*watches: Watch) -> Watch:
    """One that calls all of these, in order."""

    def watch(engine: "Engine") -> None:
        for each in watches:
            each(engine)

    return watch


class Engine:
    """One rank of a replica. `source` is the same list of rows on every rank of every replica."""

    def __init__(
        self,
        scheduler: Scheduler,
        stage: Stage,
        source: Source,
        replicas: Replicas,
        results: Results,
        digests: DigestChain | Undigested,
        clock: Clock,
        watch: Watch = unwatched,
    ) -> None:
        """
        Args:
            digests: what the ranks of a replica compare at each tick; all have a DigestChain or none has.
            clock: told when each phase of a tick ends; the stage tells it of its own ones.
            watch: called after every tick: progress, traces, tests.
        """
        self.scheduler = scheduler
        self.stage = stage
        self.source = source
        self.replicas = replicas
        self.results = results
        self.digests = digests
        self.clock = clock
        self.watch = watch
        self.ring: deque[Plan] = deque()  # plans in flight, oldest first
        self.depth = scheduler.limits.slots + scheduler.limits.lookahead  # most plans in flight
        self.exhausted = False
        self.rows = 0  # taken from the source for this replica
        self.passed = 0  # rows of the source gone through, for any replica
        self.reported = 0  # output tokens, in all loads so far
        self.stopped = 0  # who asked to stop, as the leader passed it on; 0: nobody
        self.host_times = Histogram()  # of a tick's Python beside `Stage.run`, without waiting for anybody

    def run(self) -> None:
        """Tick until every row is answered, or somebody asks to stop; then what is in flight is still committed.

        Raises:
            Diverged: this rank and the leader of its replica, or two replicas, are no longer alike.
        """
        for tick in count():
            self.tick(tick)
            self.watch(self)
            self.clock.end(Phase.WATCH)
            if self.replicas.over:
                break
        self.drain()

    def drain(self) -> None:
        """After the last tick: commit what is in flight, and wait until all that was sent has left."""
        while self.ring:
            self._commit(self.ring.popleft())
        self.stage.drain()
        self.replicas.drain()

    def tick(self, tick: int) -> None:
        """One turn of the loop. With a tick's number all ranks mean the same one."""
        scheduler, replicas, clock = self.scheduler, self.replicas, self.clock
        before = clock.host.python_ns
        if len(self.ring) == self.depth:
            self._commit(self.ring.popleft())
        replicas.listen()
        clock.end(Phase.LISTEN, replicas.exchange_seconds)
        self._feed()
        clock.end(Phase.FEED, self.source.waited)
        plan = scheduler.schedule(tick, replicas.admits(tick, scheduler.num_running, scheduler.num_waiting))
        plan.digests = self.digests.plan(plan)
        clock.end(Phase.SCHEDULE)
        shared_rows = replicas.report(self._load(plan))
        clock.end(Phase.REPORT, replicas.exchange_seconds)
        sampled = self.stage.run(plan, shared_rows)
        self.results.send(plan, sampled)
        self.ring.append(plan)
        clock.end(Phase.RETURN, self.results.waited)
        self.host_times.add((clock.host.python_ns - before) / 1e9)

    def _commit(self, plan: Plan) -> None:
        packet = self.results.receive(plan)
        self.digests.compare(plan, packet.digests)
        self.digests.commit(packet.tokens, packet.finished)
        self.stopped = self.stopped or packet.stop
        self.results.finish(self.scheduler.commit(plan, packet.tokens, packet.finished))
        self.clock.end(Phase.COMMIT, self.results.waited)
        if packet.tokens:
            self.clock.settle()

    def _feed(self) -> None:
        """Go on in the list as far as replicas need rows and it has any, and take those that are this one's.

        A row that can't be answered counts in its tick as one that can: reading it took time.
        """
        bad = 0
        while not self.exhausted and (own := self.replicas.next_row(self.scheduler.num_requests + bad)) is not None:
            row = self.source.next_row(own)
            if row is None:
                self.exhausted = True
                break
            if (requests := num_requests(row)) != 1:
                self.replicas.took(requests)
            if isinstance(row, NotYet):
                break
            self.passed += 1
            if isinstance(row, Skipped):
                continue
            self.rows += 1
            if isinstance(row, Job):
                for request in row.requests:
                    self.scheduler.add(request)
            else:
                bad += 1
            self.results.open(row)

    def _load(self, plan: Plan) -> Load:
        """What the other replicas learn of this tick."""
        scheduler = self.scheduler
        committed = scheduler.counters.output_tokens
        tokens, self.reported = committed - self.reported, committed
        return Load(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.pool.num_free,
            prompt_tokens=plan.num_prompt_tokens,
            decode_rows=plan.num_decodes,
            rows=plan.num_rows,
            claimed=self.rows,
            flags=EXHAUSTED if self.exhausted and not scheduler.waiting.aside else 0,
            stop=self.stopped,
            passed=self.passed,
            tokens=tokens,
        )
