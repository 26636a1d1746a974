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


def make_request(
    index: int,
    prompt: int | Sequence[int] = 3,
    max_tokens: int = 5,
    priority: int = 0,
    stop: tuple[int, ...] = (),
) -> Request:
    tokens = [(index * 31 + i * 7) % 97 for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
    return Request(index, 0, tokens, SamplingParams(max_tokens=max_tokens, stop_token_ids=stop), priority)


def next_token(request: Request) -> int:
    """A stand-in for the model: depends on the whole sequence so far, as a real one does."""
    return (sum(request.tokens) * 31 + len(request.tokens)) % 89


def is_last(request: Request, token: int, position: int) -> bool:
    """Whether a request ends with the token at a position."""
    params = request.params
    return token in params.stop_token_ids or position - request.prompt_len + 1 == params.max_tokens


class Simulation:
    """`tick()` commits the oldest plan in flight if there are enough and schedules the next, as the engine does."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.ring: deque[Plan] = deque()
        self.plans: list[Plan] = []
        self.rows: list[list[int]] = []  # request indices of the decode rows of each plan
        self.finished: list[Request] = []
        self.ghosts = 0  # rows whose token came too late

    def add(self, requests: Iterable[Request]) -> "Simulation":
        pool = self.scheduler.pool
        for request in requests:
            assert len(request.tokens) + request.params.max_tokens - 1 <= (pool.num_blocks - 1) * pool.block_size
            self.scheduler.add(request)
        return self

    def tick(self) -> Plan:
        limits = self.scheduler.limits
        if len(self.ring) == limits.slots + limits.lookahead:
            self.commit()
        plan = self.scheduler.schedule(len(self.plans))
        self.plans.append(plan)
        self.rows.append([request.index for request in plan.requests[: plan.num_decodes]])
        self.ring.append(plan)
        self.check(plan)
        return plan

    def commit(self) -> None:
        plan = self.ring.popleft()
        tokens, ends = [], []
        for request, position in zip(plan.sampled, plan.sample_positions, strict=True):
            if request.finished:
                self.ghosts += 1
                tokens.append(-1)
                ends.append(position % 2 == 0)
            else:
                assert position == len(request.tokens)
                tokens.append(next_token(request))
                ends.append(is_last(request, tokens[-1], position))
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
        assert not any(request.retired for request in plan.requests)
        assert plan.num_decodes <= limits.decode_rows
        assert plan.num_decodes + plan.num_prompt_tokens <= limits.max_num_batched_tokens
        assert sum(plan.counts) == plan.num_decodes + plan.num_prompt_tokens
        for request, start, count in zip(plan.requests, plan.starts, plan.counts, strict=True):
            assert start + count <= len(request.blocks) * self.scheduler.pool.block_size


def expected_output(request: Request) -> list[int]:
    """What an undisturbed run gives."""
    twin = Request(request.index, 0, request.tokens[: request.prompt_len], request.params)
    while not twin.output or not is_last(twin, twin.tokens[-1], len(twin.tokens) - 1):
        twin.tokens.append(next_token(twin))
    return list(twin.output)


def run_all(scheduler: Scheduler, requests: Sequence[Request]) -> Simulation:
    """A simulation of these requests, after it has ended and each has got its tokens."""
    simulation = Simulation(scheduler).add(requests)
    finished = simulation.run()
    assert sorted(r.index for r in finished) == sorted(r.index for r in requests)
    for request in finished:
        assert list(request.output) == expected_output(request), "ghost, lost or wrong token"
    return simulation
