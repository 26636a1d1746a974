"""What the balance between replicas brings, without a model, and what the exchange of loads costs.

python -m spmd.bench.balance [dp] [rows]

Real engines run in one process with a made-up stage and exchange; output lengths are lognormal. Ticks count as equally
long, so the time of prompts, which a gate is for, isn't in the figures: how often replicas prefill apart is. The cost
is that of the real exchange between processes of this machine.
"""

import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import mean
from time import perf_counter
from typing import cast

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spmd.api.endpoints import COMPLETIONS
from spmd.api.rows import Job
from spmd.api.source import Listed
from spmd.engine import Engine
from spmd.leader import Leader
from spmd.parallel.groups import disconnect
from spmd.parallel.load import LoadExchange
from spmd.parallel.packet import PacketWire
from spmd.report.metrics import Metrics
from spmd.sampling.sampler import Sampled
from spmd.schedule.balance import Balance, Load, Rules
from spmd.schedule.blocks import BlockPool
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request, SamplingParams
from spmd.schedule.scheduler import Limits, Scheduler
from spmd.stage.stage import Stage

BLOCK_SIZE = 16
PROMPT, MEDIAN, SIGMA, LONGEST = 64, 60, 1.5, 2000  # tokens of a prompt, of outputs, and their spread
SEATS, ROWS, SEEDS = 32, 4000, 4  # seats of a replica, rows of a list, lists
EXCHANGES = 2000


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
    """One replica's end of it; a LoadExchange without ranks."""

    def __init__(self, board: Board, replica: int) -> None:
        self.board = board
        self.replica = replica
        self.taken = 0

    def launch(self, load: Load) -> None:
        assert all(-(2**31) <= number < 2**31 for number in load)
        self.board.written[self.replica].append(load)

    def take(self) -> list[Load] | None:
        if len(self.board.written[self.replica]) - self.taken <= self.board.rules.lag:
            return None
        self.taken += 1
        return [written[self.taken - 1] for written in self.board.written]

    def drain(self) -> None:
        pass


class Model:
    """A stage that samples token 1 for everybody."""

    result_lag = 0

    def run(self, plan: Plan, shared_rows: int | None = None) -> Sampled | None:
        return Sampled(torch.ones(len(plan.sampled), dtype=torch.int64)) if plan.sampled else None

    def drain(self) -> None:
        pass


class Fleet:
    """All replicas of a run. `engines[i].balance.gate.frozen_ticks` and the like are the results."""

    def __init__(self, rules: Rules, make_jobs: Callable[[], list[Job]], limits: Limits | None = None) -> None:
        """`make_jobs` gives each replica the list of all rows, in objects of its own."""
        seats = rules.max_num_seqs
        self.board = Board(rules)
        self.limits = limits or Limits(seats, 2048, decode_rows=seats, slots=1, by_priority=rules.by_priority)
        self.engines = [self._engine(replace(rules, dp_rank=rank), make_jobs()) for rank in range(rules.dp)]
        self.ticks = [0] * rules.dp
        self.busy = [0] * rules.dp  # ticks until the last plan that wasn't empty

    def _engine(self, rules: Rules, jobs: list[Job]) -> Engine:
        longest = max((job.requests[0].full_length for job in jobs), default=0)
        pool = BlockPool(rules.max_num_seqs * (longest // BLOCK_SIZE + 1) + 1, BLOCK_SIZE, False)
        scheduler = Scheduler(self.limits, pool)
        exchange = cast(LoadExchange, BoardExchange(self.board, rules.dp_rank)) if rules.dp > 1 else None
        stage, packets, leader = cast(Stage, Model()), PacketWire(None, 0, True, 1), Leader(None, "bench", Metrics())
        return Engine(scheduler, stage, packets, Listed(jobs), Balance(rules), leader, exchange)

    def run(self, rng: random.Random | None = None, most: int = 10**6) -> "Fleet":
        """Tick until all is done, in turn, or with `rng` in any order that the exchange allows."""
        working = list(range(len(self.engines)))
        for _ in range(most):
            able = [replica for replica in working if self.board.may_tick(replica)]
            replica = rng.choice(able) if rng else min(able, key=self.ticks.__getitem__)
            if self.tick(replica):
                working.remove(replica)
            if not working:
                return self
        raise AssertionError(f"not done after {most} ticks: {self.ticks}")

    def tick(self, replica: int) -> bool:
        """One tick of a replica; whether it was the last."""
        engine = self.engines[replica]
        engine.tick(self.ticks[replica])
        self.ticks[replica] += 1
        if engine.ring[-1].requests:
            self.busy[replica] = self.ticks[replica]
        return engine.over

    @property
    def idle_tail(self) -> float:
        """Share of the run that comes after a replica's last token, mean over the replicas."""
        return 1 - sum(self.busy) / len(self.busy) / max(self.busy)


def lognormal_jobs(rows: int, sigma: float = SIGMA, seed: int = 0) -> list[Job]:
    """Prompts of PROMPT tokens, outputs of lognormal lengths, in random order."""
    rng = random.Random(seed)
    lengths = [min(LONGEST, max(1, round(rng.lognormvariate(math.log(MEDIAN), sigma)))) for _ in range(rows)]
    return [make_job(index, PROMPT, length) for index, length in enumerate(lengths)]


def make_job(index: int, prompt: int, output: int) -> Job:
    tokens, params = [index % 1000] * prompt, SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    return Job(index, str(index), COMPLETIONS, [Request(index, 0, [*tokens], params)], tokens)


def balance_rows(dp: int, rows: int) -> Iterator[str]:
    """A line for each way to share and each gate: means over SEEDS lists, and the longest idle tail."""
    yield f"{'share':8} {'gate':10} {'lag':>3} {'ticks':>7} {'idle tail':>10} {'longest':>8} {'frozen':>7} {'mixed':>7}"
    for share, gate, lag in [
        *(("static", "off", 4), ("dynamic", "off", 0), ("dynamic", "off", 4), ("dynamic", "off", 16)),
        *(("dynamic", "saturated", 4), ("dynamic", "near", 4), ("dynamic", "interval", 4)),
    ]:
        rules = Rules(SEATS, dp=dp, share=share, gate=gate, lag=lag)
        fleets = [Fleet(rules, partial(lognormal_jobs, rows, seed=seed)).run() for seed in range(SEEDS)]
        ticks = mean(max(fleet.busy) for fleet in fleets)
        tail, longest = (f"{100 * of(fleet.idle_tail for fleet in fleets):.2f} %" for of in (mean, max))
        frozen = mean(sum(engine.balance.gate.frozen_ticks for engine in fleet.engines) for fleet in fleets)
        mixed = mean(fleet.engines[0].balance.mixed_ticks for fleet in fleets)
        yield f"{share:8} {gate:10} {lag:3} {ticks:7,.0f} {tail:>10} {longest:>8} {frozen:7,.0f} {mixed:7,.0f}"


def time_exchange(rank: int, dp: int, port: int) -> None:
    """Print, on rank 0, the mean time of one exchange."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=dp)
    told = []
    for lag in (0, 4):
        assert dist.group.WORLD is not None
        wire, load = LoadExchange(dist.group.WORLD, dp, lag), Load(*range(len(Load._fields)))
        started = perf_counter()
        for _ in range(EXCHANGES):
            wire.launch(load)
            wire.take()
        wire.drain()
        told.append(f"lag {lag} {1e6 * (perf_counter() - started) / EXCHANGES:7.0f} us")
    if rank == 0:
        print(f"dp={dp}: {', '.join(told)}", flush=True)
    disconnect()


def main(dp: int = 4, rows: int = ROWS) -> None:
    lists = f"{SEEDS} lists of {rows:,} rows, outputs lognormal (median {MEDIAN}, sigma {SIGMA})"
    print(f"dp={dp}, {SEATS} seats a replica, {lists}")
    for line in balance_rows(dp, rows):
        print(line, flush=True)
    print("one exchange, launched and taken, nothing else to do:")
    for size in (2, 4, 8):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(time_exchange, (size, store.port), size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
