"""Drives a scheduler without a model: a ring of plans, made-up tokens, invariants checked after every tick."""

from collections import deque
from collections.abc import Iterable, Sequence

from spmd.schedule.blocks import BlockPool
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request, SamplingParams
from spmd.schedule.scheduler import Limits, Scheduler


def make_scheduler(
    max_num_seqs: int = 16,
    pp: int = 2,
    async_depth: int = 0,
    num_blocks: int = 200,
    block_size: int = 4,
    max_num_batched_tokens: int = 64,
    caching: bool = True,
    **limits: object,
) -> Scheduler:
    sizes = Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        decode_rows=max_num_seqs // pp,
        slots=pp + async_depth,
        **limits,
    )
    return Scheduler(sizes, BlockPool(num_blocks, block_size, caching))


def make_request(index: int, prompt: int | Sequence[int] = 3, max_tokens: int = 5, priority: int = 0) -> Request:
    tokens = [(index * 31 + i * 7) % 97 for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
    return Request(index, 0, tokens, SamplingParams(max_tokens=max_tokens), priority)


def next_token(request: Request) -> int:
    """A stand-in for the model: depends on the whole sequence so far, as a real one does."""
    return (sum(request.tokens) * 31 + len(request.tokens)) % 89


class Simulation:
    """`tick()` commits the oldest plan of a full ring and schedules the next, as the engine does."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.ring: deque[Plan] = deque()
        self.plans: list[Plan] = []
        self.rows: list[list[int]] = []  # request indices of the decode rows of each plan
        self.finished: list[Request] = []

    def add(self, requests: Iterable[Request]) -> "Simulation":
        pool = self.scheduler.pool
        for request in requests:
            assert len(request.tokens) + request.params.max_tokens - 1 <= (pool.num_blocks - 1) * pool.block_size
            self.scheduler.add(request)
        return self

    def tick(self) -> Plan:
        if len(self.ring) == self.scheduler.limits.slots:
            self.commit()
        plan = self.scheduler.schedule(len(self.plans))
        self.plans.append(plan)
        self.rows.append([request.index for request in plan.requests[: plan.num_decodes]])
        self.ring.append(plan)
        self.check(plan)
        return plan

    def commit(self) -> None:
        plan = self.ring.popleft()
        tokens = [next_token(request) for request in plan.sampled]
        ends = [request.num_output + 1 == request.params.max_tokens for request in plan.sampled]
        self.finished += self.scheduler.commit(plan, tokens, ends)

    def run(self, max_ticks: int = 5000) -> list[Request]:
        """Tick until every request has finished; returns them as they finished."""
        for _ in range(max_ticks):
            if not self.scheduler.num_requests:
                break
            self.tick()
        assert not self.scheduler.num_requests, "requests starve"
        while self.ring:
            self.commit()
        self.scheduler.check(self.ring)
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks - 1
        return self.finished

    def check(self, plan: Plan) -> None:
        limits = self.scheduler.limits
        self.scheduler.check(self.ring)
        assert plan.num_decodes <= limits.decode_rows
        assert plan.num_decodes + plan.num_prompt_tokens <= limits.max_num_batched_tokens
        assert sum(plan.counts) == plan.num_decodes + plan.num_prompt_tokens
        for request, start, count in zip(plan.requests, plan.starts, plan.counts, strict=True):
            assert start + count <= len(request.blocks) * self.scheduler.pool.block_size


def expected_output(request: Request) -> list[int]:
    """What an undisturbed run gives."""
    twin = Request(request.index, 0, request.tokens[: request.prompt_len], request.params)
    for _ in range(request.params.max_tokens):
        twin.tokens.append(next_token(twin))
    return list(twin.output)
