"""The scheduler: which requests run in the next micro-batch. A pure function of what it was given, in order.

Every rank of a replica holds its own copy and calls `add`, `schedule` and `commit` with equal arguments at equal
ticks, so the copies stay equal without talking. Continuous batching over paged KV blocks, chunked prefill, prefix
caching, preemption by recompute, and decode micro-batches that keep all slots of the pipeline's ring equally full.

A request is in one of these places:

    waiting     no seat, no blocks (new, or preempted)
    prefilling  seated; some of its prompt isn't planned yet, earlier chunks may be in flight
    ready       seated, not in flight, its next token can be computed; least recently run first
    in flight   in one plan (prompt chunks: several) whose outcome hasn't come back
"""

from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from spmd.schedule.blocks import BlockPool, hash_block
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request


@dataclass
class Counters:
    """What the scheduler did, for the summary."""

    preemptions: int = 0
    queried_tokens: int = 0  # prompt tokens looked up in the prefix cache
    cached_tokens: int = 0  # of these, found


@dataclass(frozen=True)
class Limits:
    """How large a plan may grow; see `spmd.config.SchedulerConfig` for the keys."""

    max_num_seqs: int
    max_num_batched_tokens: int
    decode_rows: int  # B: decode rows of one plan
    slots: int  # N: micro-batches in flight
    balanced: bool = True  # share the decodes equally among the slots
    exclusive: bool = False  # a plan is all prefill or all decode
    prefill_batch: int = 1
    prefill_spread: int = 0
    by_priority: bool = False
    decode_buckets: tuple[int, ...] = ()


class Scheduler:
    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.counters = Counters()
        self.waiting: list[Request] = []  # by order of admission
        self.prefilling: list[Request] = []  # likewise
        self.ready: deque[Request] = deque()
        self.num_decoding = 0  # seated requests whose whole prompt is planned
        self._free_seats = list(range(limits.max_num_seqs - 1, -1, -1))
        self._row_counts = sorted({*limits.decode_buckets, limits.decode_rows})

    @property
    def num_running(self) -> int:
        return self.limits.max_num_seqs - len(self._free_seats)

    @property
    def num_requests(self) -> int:
        """Requests added and not finished."""
        return self.num_running + len(self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request. It must fit the pool when alone (checked where rows are parsed)."""
        insort(self.waiting, request, key=self._order)

    # -- schedule ------------------------------------------------------------------------------------------------

    def schedule(self, tick: int) -> Plan:
        """The plan of this tick; empty if nothing can run. Its requests are in flight until `commit`."""
        plan = Plan(tick)
        if not self.limits.exclusive:
            self._plan_decodes(plan)
            self._plan_prompts(plan)
        else:
            self._plan_prompts(plan)
            if not plan.requests:
                self._plan_decodes(plan)
        return self._finalised(plan)

    def _plan_decodes(self, plan: Plan) -> None:
        """Choose ready requests, least recently run first; preempt where the pool is empty."""
        chosen: list[Request] = []
        passed_over: list[Request] = []
        cap = self._decode_cap()
        while self.ready and len(chosen) < cap:
            request = self.ready.popleft()
            if self._has_block(request, chosen, passed_over, plan):
                chosen.append(request)
            elif request.seat >= 0:
                passed_over.append(request)
        self.ready.extendleft(reversed(passed_over))
        for request in chosen:
            self._add(plan, request, 1)
        plan.num_decodes = len(chosen)

    def _decode_cap(self) -> int:
        """Rows for this slot: an equal share of all decodes, so that 8 requests in 2 slots run 4/4 and not 8/0."""
        if not self.limits.balanced:
            return self.limits.decode_rows
        return min(self.limits.decode_rows, -(-self.num_decoding // self.limits.slots))

    def _has_block(self, request: Request, chosen: list[Request], passed_over: list[Request], plan: Plan) -> bool:
        """Whether the next token of `request` has a place; takes a block where it starts one."""
        index = request.scheduled // self.pool.block_size
        if index < len(request.blocks):
            return True
        while not self.pool.num_free:
            if (victim := self._victim(request, [*chosen, *passed_over])) is None:
                return False
            if victim in chosen:
                chosen.remove(victim)
                plan.grown = [entry for entry in plan.grown if entry[0] != victim.seat]
            if victim in passed_over:
                passed_over.remove(victim)
            self._preempt(victim)
            if victim is request:
                return False
        request.blocks.append(self.pool.take())
        plan.grown.append((request.seat, index, request.blocks[index]))
        return True

    def _victim(self, request: Request, considered: list[Request]) -> Request | None:
        """Whom to preempt so that `request` can go on: the last in the order of admission that isn't in flight.

        None: `request` itself would be the one, but others are in flight; let it wait for their commits first.
        """
        candidates = [request, *considered, *self.ready, *(r for r in self.prefilling if not r.in_flight)]
        victim = max(candidates, key=self._order)
        if victim is request and self.num_running > len(candidates):
            return None
        return victim

    def _preempt(self, request: Request) -> None:
        """Take away seat and blocks; the request waits to be computed again from its tokens."""
        self.counters.preemptions += 1
        if request in self.prefilling:
            self.prefilling.remove(request)
        else:
            self.num_decoding -= 1
            if request in self.ready:
                self.ready.remove(request)
        self._unseat(request)
        self.add(request)

    def _plan_prompts(self, plan: Plan) -> None:
        """Chunks of seated prompts first, then of newly admitted ones, while budget, seats and blocks last."""
        budget = min(self.limits.max_num_batched_tokens - plan.num_decodes, self._prompt_share())
        places = self.limits.prefill_batch if self.limits.exclusive else self.limits.max_num_seqs
        queue = iter(list(self.prefilling))
        while budget > 0 and places > 0:
            request = next(queue, None) or self._admit(plan)
            if request is None:
                break
            count = min(len(request.tokens) - request.scheduled, budget)
            self._add(plan, request, count)
            plan.num_prompt_tokens += count
            if request.scheduled == len(request.tokens):
                self.prefilling.remove(request)
                self.num_decoding += 1
            budget -= count
            places -= 1

    def _prompt_share(self) -> int:
        """Prompt tokens for this plan: a share of those that wait, so that micro-batches take about equal time.

        Source: token throttling of gLLM (arXiv 2504.14775), without its KV term: admission reserves a prompt's blocks.
        In whole blocks, so that few shapes of forwards occur.
        """
        if not self.limits.prefill_spread or self.limits.exclusive:
            return self.limits.max_num_batched_tokens
        seated = [*self.prefilling, *self.waiting[: len(self._free_seats)]]
        pending = sum(len(request.tokens) - request.scheduled for request in seated)
        size = self.pool.block_size
        return max(1, -(-pending // (self.limits.prefill_spread * size))) * size

    def _admit(self, plan: Plan) -> Request | None:
        """Seat the first waiting request if all blocks of its prompt are to be had; it may not jump the queue."""
        if not self.waiting or not self._free_seats:
            return None
        request = self.waiting[0]
        shared = self._known_prefix(request)
        needed = -(-len(request.tokens) // self.pool.block_size) - len(shared)
        if needed > self.pool.num_free - self.pool.num_idle(shared):
            return None
        del self.waiting[0]
        self.pool.share(shared)
        request.blocks = shared + [self.pool.take() for _ in range(needed)]
        request.seat = self._free_seats.pop()
        request.scheduled = request.cached = len(shared) * self.pool.block_size
        plan.grown.extend((request.seat, index, block) for index, block in enumerate(request.blocks))
        self.prefilling.append(request)
        if self.pool.caching:
            self.counters.queried_tokens += len(request.tokens)
            self.counters.cached_tokens += request.cached
        return request

    def _known_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the request's tokens; never all of them, since the last token's logits must be computed."""
        if not self.pool.caching:
            return []
        self._extend_hashes(request, (len(request.tokens) - 1) // self.pool.block_size)
        return self.pool.find(request.hashes[: (len(request.tokens) - 1) // self.pool.block_size])

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        size = self.pool.block_size
        for index in range(len(request.hashes), num_blocks):
            parent = request.hashes[-1] if request.hashes else b""
            request.hashes.append(hash_block(parent, request.tokens[index * size : (index + 1) * size]))

    def _finalised(self, plan: Plan) -> Plan:
        """Decide the padding and who is sampled."""
        plan.padded_decodes = plan.num_decodes
        if plan.num_decodes and not plan.num_prompt_tokens:
            plan.padded_decodes = next(rows for rows in self._row_counts if rows >= plan.num_decodes)
        plan.sampled = plan.requests[: plan.num_decodes]
        plan.sample_rows = list(range(plan.num_decodes))
        row = plan.padded_decodes
        for index in range(plan.num_decodes, len(plan.requests)):
            request = plan.requests[index]
            row += plan.counts[index]
            if plan.starts[index] + plan.counts[index] == len(request.tokens):
                plan.sampled.append(request)
                plan.sample_rows.append(row - 1)
        return plan

    def _add(self, plan: Plan, request: Request, count: int) -> None:
        """Put tokens into a plan for good, and let others share the blocks they fill.

        The content will be there in time: every stage runs plans in order, and writes a plan's keys and values before
        it reads them.
        """
        first = request.scheduled // self.pool.block_size
        plan.add(request, count)
        full = request.scheduled // self.pool.block_size
        if self.pool.caching and full > first:
            self._extend_hashes(request, full)
            for index in range(first, full):
                self.pool.register(request.blocks[index], request.hashes[index])

    # -- commit --------------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, tokens: Sequence[int], finished: Sequence[bool]) -> list[Request]:
        """Take back a plan with one token and one verdict for each of `plan.sampled`; returns the finished requests."""
        for request in plan.requests:
            request.in_flight -= 1
        done = []
        for request, token, ends in zip(plan.sampled, tokens, finished, strict=True):
            request.tokens.append(token)
            if ends:
                self.num_decoding -= 1
                self._unseat(request)
                done.append(request)
            else:
                self.ready.append(request)
        return done

    def _unseat(self, request: Request) -> None:
        assert request.in_flight == 0, "a request in flight keeps its blocks"
        self.pool.release(request.blocks)
        self._free_seats.append(request.seat)
        request.blocks, request.seat, request.scheduled = [], -1, 0

    def _order(self, request: Request) -> tuple[int, int, int]:
        return (request.priority if self.limits.by_priority else 0, request.index, request.choice)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self, ring: Sequence[Plan]) -> None:
        """Assert that every request is in one place and every block is accounted for, given the plans in flight."""
        flying = {id(r): r for plan in ring for r in plan.requests}
        seated = {id(r): r for r in [*flying.values(), *self.prefilling, *self.ready]}
        for request in seated.values():
            assert request.in_flight == sum(request in plan.requests for plan in ring)
            assert request.seat >= 0 and request not in self.waiting
            assert len(request.blocks) * self.pool.block_size >= request.scheduled
        assert not any(request.in_flight for request in self.ready)
        assert len({r.seat for r in seated.values()}) == len(seated) == self.num_running
        assert self.num_decoding == self.num_running - len(self.prefilling)
        self.pool.check([request.blocks for request in seated.values()])
