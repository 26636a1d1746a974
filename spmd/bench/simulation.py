"""Replicas without a model, GPUs or other ranks: real engines and schedulers, whose tokens and messages are made up.

A `Replica` is one engine; a `Fleet` is several that share a list of rows, in one process. Both tick when they are told
to, so a benchmark can count ticks and a test can look at every plan. What is made up stands behind the engine's own
Protocols: `Stage`, `Results`, and the `Exchange` of loads.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from spmd.api.rows import BadRow, Job
from spmd.api.source import Listed, Source
from spmd.engine import Engine, Replicas
from spmd.parallel.packet import Packet
from spmd.parallel.replicas import Exchanging
from spmd.report.metrics import Metrics
from spmd.sampling.sampler import Sampled
from spmd.schedule.balance import Load, Rules
from spmd.schedule.blocks import BlockPool
from spmd.schedule.digests import Undigested
from spmd.schedule.limits import Limits
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request
from spmd.schedule.scheduler import Scheduler
from spmd.trace.host_clock import HostClock

BLOCK_SIZE = 16  # tokens, of a fleet's pools

Token = Callable[[Request], int]


def always_one(request: Request) -> int:
    """A model that says 1."""
    return 1


def is_last(request: Request, token: int, position: int) -> bool:
    """Whether a request ends with the token at a position."""
    params = request.params
    return token in params.stop_token_ids or position - request.prompt_len + 1 == params.max_tokens


class NoModel:
    """A stage that computes nothing."""

    def run(self, plan: Plan, shared_rows: int | None) -> Sampled | None:
        return None

    def drain(self) -> None: ...


class MadeUp:
    """Results without samples: tokens are made up when they are committed, from all that were committed before."""

    waited = 0.0

    def __init__(self, token: Token) -> None:
        self.token = token
        self.opened: list[int] = []  # rows
        self.finished: list[Request] = []
        self.ghosts = 0  # rows whose token came too late

    def open(self, row: Job | BadRow) -> None:
        self.opened.append(row.index)

    def send(self, plan: Plan, sampled: Sampled | None) -> None: ...

    def receive(self, plan: Plan) -> Packet:
        """Of requests that have finished, or are spoilt, it says anything, as nobody should listen."""
        packet = Packet([], [])
        for request, position in zip(plan.sampled, plan.sample_positions, strict=True):
            if request.finished or request.spoilt:
                self.ghosts += 1
                token, ends = -1, position % 2 == 0
            else:
                assert position == request.num_tokens
                token = self.token(request)
                ends = is_last(request, token, position)
            packet.tokens.append(token)
            packet.finished.append(ends)
        return packet

    def finish(self, requests: Sequence[Request]) -> None:
        self.finished += requests

    def figures(self, started: float, ended: float) -> Metrics:
        return Metrics()


class Replica:
    """One engine. `source` and `replicas`: which rows it gets, and with whom it shares them."""

    def __init__(self, scheduler: Scheduler, source: Source, replicas: Replicas, token: Token = always_one) -> None:
        self.scheduler = scheduler
        self.results = MadeUp(token)
        self.engine = Engine(scheduler, NoModel(), source, replicas, self.results, Undigested(), HostClock())
        self.ticks = 0
        self.busy = 0  # ticks until the last plan that wasn't empty

    def tick(self) -> Plan:
        """What the engine plans next."""
        self.engine.tick(self.ticks)
        self.ticks += 1
        plan = self.engine.ring[-1]
        if plan.requests:
            self.busy = self.ticks
        return plan


class Board:
    """Stands for the wire between replicas: each writes its load of each tick, and reads a row that all have filled."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.written: list[list[Load]] = [[] for _ in range(rules.dp)]

    def may_tick(self, replica: int) -> bool:
        """Whether what the replica's next tick has to know is there."""
        tick = len(self.written[replica])
        return all(len(written) >= tick - self.rules.lag for written in self.written)


class BoardExchange:
    """One replica's end of it."""

    seconds = 0.0

    def __init__(self, board: Board, replica: int) -> None:
        self.board = board
        self.replica = replica
        self.count = 0
        self.received = 0

    def launch(self, load: Sequence[int]) -> None:
        assert all(-(2**31) <= number < 2**31 for number in load)
        self.board.written[self.replica].append(Load(*load))
        self.count += 1

    def receive(self) -> list[Load] | None:
        if self.count - self.received <= self.board.rules.lag:
            return None
        self.received += 1
        return [written[self.received - 1] for written in self.board.written]

    def drain(self) -> None: ...


class Fleet:
    """All replicas of a run. `balances[i].frozen_ticks` and the like are the results."""

    def __init__(self, rules: Rules, make_jobs: Callable[[], list[Job]], limits: Limits | None = None) -> None:
        """`make_jobs` gives each replica the list of all rows, in objects of its own."""
        seats = rules.max_num_seqs
        self.board = Board(rules)
        self.limits = limits or Limits(seats, 2048, decode_rows=seats, slots=1, by_priority=rules.by_priority)
        each = [replace(rules, dp_rank=rank) for rank in range(rules.dp)]
        self.balances = [Exchanging(rules, BoardExchange(self.board, rules.dp_rank)) for rules in each]
        self.replicas = [self._replica(balance, make_jobs()) for balance in self.balances]

    def _replica(self, balance: Exchanging, jobs: list[Job]) -> Replica:
        longest = max((job.requests[0].full_length for job in jobs), default=0)
        pool = BlockPool(self.board.rules.max_num_seqs * (longest // BLOCK_SIZE + 1) + 1, BLOCK_SIZE, False)
        return Replica(Scheduler(self.limits, pool), Listed(jobs), balance)

    def run(self, rng: random.Random | None = None, most: int = 10**6) -> "Fleet":
        """Tick until all is done, in turn, or with `rng` in any order that the exchange allows."""
        working = list(range(len(self.replicas)))
        for _ in range(most):
            able = [replica for replica in working if self.board.may_tick(replica)]
            replica = rng.choice(able) if rng else min(able, key=lambda replica: self.replicas[replica].ticks)
            if self.tick(replica):
                working.remove(replica)
            if not working:
                return self
        raise AssertionError(f"not done after {most} ticks: {self.ticks}")

    def tick(self, replica: int) -> bool:
        """One tick of a replica; whether it was the last."""
        self.replicas[replica].tick()
        return self.balances[replica].over

    @property
    def ticks(self) -> list[int]:
        """Of each replica."""
        return [replica.ticks for replica in self.replicas]

    @property
    def busy(self) -> list[int]:
        """Ticks of each replica until its last token."""
        return [replica.busy for replica in self.replicas]

    @property
    def idle_tail(self) -> float:
        """Share of the run that comes after a replica's last token, mean over the replicas."""
        return 1 - sum(self.busy) / len(self.busy) / max(self.busy)
