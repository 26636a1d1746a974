"""A replica without a model, as the benchmarks simulate it, with invariants checked after every tick."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

from spmd.api.source import Listed, Source
from spmd.bench.simulation import Replica, is_last
from spmd.engine import Engine, Replicas
from spmd.parallel.replicas import Alone
from spmd.schedule.balance import Rules
from spmd.schedule.blocks import BlockPool
from spmd.schedule.limits import Limits
from spmd.schedule.plan import Plan
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams
from spmd.schedule.scheduler import Scheduler


def make_scheduler(
    max_num_seqs: int = 16,
    pp: int = 2,
    async_depth: int = 0,
    num_blocks: int = 200,
    block_size: int = 4,
    max_num_batched_tokens: int = 64,
    caching: bool = True,
    **limits: Any,
) -> Scheduler:
    sizes = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        decode_rows=max_num_seqs // pp,
        slots=pp + async_depth,
        **limits,
    )
    return Scheduler(sizes, BlockPool(num_blocks, block_size, caching))


def make_request(
    index: int,
    prompt: int | Sequence[int] = 3,
    max_tokens: int = 5,
    priority: int = 0,
    stop: tuple[int, ...] = (),
    waits: bool = False,
) -> Request:
    asked = Prompt([(index * 31 + i * 7) % 97 for i in range(prompt)] if isinstance(prompt, int) else prompt)
    return Request(index, 0, asked, SamplingParams(max_tokens=max_tokens, stop_token_ids=stop), priority, waits)


def next_token(request: Request) -> int:
    """A stand-in for the model: depends on the whole sequence so far, as a real one does."""
    return (sum(request.tokens()) * 31 + request.num_tokens) % 89


def check(engine: Engine, plan: Plan) -> None:
    """Assert that the scheduler is intact and its latest plan within the limits."""
    scheduler = engine.scheduler
    scheduler.check(engine.ring)
    assert not any(request.retired for request in plan.requests)
    assert plan.num_decodes <= scheduler.limits.decode_rows
    assert plan.num_decodes + plan.num_prompt_tokens <= scheduler.limits.max_num_batched_tokens
    assert sum(plan.counts) == plan.num_decodes + plan.num_prompt_tokens
    for request, start, count in zip(plan.requests, plan.starts, plan.counts, strict=True):
        assert start + count <= len(request.blocks) * scheduler.pool.block_size
        assert not request.waits_for_token or start + count <= request.num_tokens


class Simulation(Replica):
    """A replica whose every plan is checked and kept. `add` gives it requests besides those of its source."""

    def __init__(self, scheduler: Scheduler, source: Source | None = None, replicas: Replicas | None = None) -> None:
        alone = Alone(Rules(scheduler.limits.max_num_seqs))
        super().__init__(scheduler, source or Listed([]), replicas or alone, next_token)
        self.ring = self.engine.ring
        self.finished = self.results.finished
        self.plans: list[Plan] = []
        self.rows: list[list[int]] = []  # request indices of the decode rows of each plan

    @property
    def ghosts(self) -> int:
        return self.results.ghosts

    def add(self, requests: Iterable[Request]) -> Self:
        pool = self.scheduler.pool
        for request in requests:
            assert request.full_length <= (pool.num_blocks - 1) * pool.block_size
            self.scheduler.add(request)
        return self

    def tick(self) -> Plan:
        plan = super().tick()
        self.plans.append(plan)
        self.rows.append([request.index for request in plan.requests[: plan.num_decodes]])
        check(self.engine, plan)
        return plan

    def run(self, most: int = 5000) -> list[Request]:
        """Tick until all is done; returns the requests as they finished."""
        for _ in range(most):
            self.tick()
            if self.engine.replicas.over:
                break
        assert self.engine.replicas.over, f"not done after {most} ticks: requests starve"
        self.engine.drain()
        self.scheduler.check(self.ring)
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks - 1
        return self.finished


def expected_output(request: Request) -> list[int]:
    """What an undisturbed run gives."""
    twin = Request(request.index, 0, request.prompt, request.params)
    while not twin.output or not is_last(twin, twin.output[-1], twin.num_tokens - 1):
        twin.output.append(next_token(twin))
    return list(twin.output)


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> Simulation:
    """A simulation of these requests, after it has ended and each has got its tokens."""
    simulation = Simulation(scheduler).add(requests)
    finished = simulation.run()
    assert sorted(r.index for r in finished) == sorted(r.index for r in requests)
    for request in finished:
        assert list(request.output) == expected_output(request), "ghost, lost or wrong token"
    return simulation
