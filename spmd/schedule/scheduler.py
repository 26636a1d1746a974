"""The scheduler: which requests run in the next micro-batch. A pure function of what it was given, in order.

Every rank of a replica holds its own copy and calls `add`, `schedule` and `commit` with equal arguments at equal
ticks, so the copies stay equal without talking. Continuous batching over paged KV blocks, chunked prefill, prefix
caching, preemption by recompute, and decode micro-batches that keep all slots of the pipeline's ring equally full.

A request is in one of these places:

    waiting     no seat, no blocks (new, or preempted); `spmd.schedule.waiting` says who is next
    prefilling  seated; some of its prompt isn't planned yet, earlier chunks may be in flight
    in a slot   seated; in one of the last N plans (prompt chunks: several), its next token can't be computed yet
    ready       seated; its next token can be computed; least recently run first
    held        seated; in a plan that has matured but isn't committed; it `waits_for_token`
    retired     seated; gets no more rows, but has some in flight; some of these, the spoilt, wait again behind that

A plan of N ticks ago *matures*: its slot is used again, and its tokens are on the first stage's device. `commit` brings
them to the host up to `lookahead` ticks later. Until then its requests are *in flight* and keep seat and blocks,
wherever they are. Rows planned for a request before its end was known are ghosts: they give no token. A request that
`waits_for_token` is ready only when both has happened, so it has no ghosts, and runs every N + lookahead ticks.

NaN spreads: whatever is multiplied by it is NaN, also by the zero that attention gives to tokens that a row may not see
(those behind it in a prompt, and what stands in a block behind its last token). So a row may get NO_TOKEN by what
another has left in a block, or has computed for a prefix that both have. It is *spoilt* then: the prefix cache forgets
its blocks, they are cleared before anybody else gets them, and it is computed a second time, *alone*: in blocks that
are cleared as it takes them, and shared with nobody who came before. What it reads then is its own or zero. If it gets
NO_TOKEN again, that is its own doing, and the leader ends it.
"""

from collections import deque
from collections.abc import Sequence

from spmd.integers import ceil_div, round_up
from spmd.schedule.blocks import BlockPool
from spmd.schedule.limits import Counters, Limits
from spmd.schedule.plan import Plan
from spmd.schedule.prefix import known_prefix, register
from spmd.schedule.request import NO_TOKEN, Request
from spmd.schedule.waiting import Waiting

MOST_NEW_BLOCKS = 8192  # a plan that has so many for its block tables seats nobody else: a few ms of the host's time


class Scheduler:
    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.counters = Counters()
        self.waiting = Waiting(self._order, limits.long_prompt, limits.max_num_seqs)
        self.prefilling: list[Request] = []  # by order of admission
        self.ready: deque[Request] = deque()
        self.num_decoding = 0  # seated requests whose whole prompt is planned, but for the retired
        self.num_ordinary = 0  # seated requests that never stood aside
        self._ring: deque[Plan] = deque()  # the last N plans, oldest first
        self._free_seats = list(range(limits.max_num_seqs - 1, -1, -1))
        self._row_counts = sorted({*limits.decode_buckets, limits.decode_rows})
        self._mixed_counts = sorted(limits.mixed_buckets)

    @property
    def num_running(self) -> int:
        return self.limits.max_num_seqs - len(self._free_seats)

    @property
    def num_waiting(self) -> int:
        """Requests in the line for a seat. Long prompts that stand aside are none of them."""
        return len(self._line())

    @property
    def num_requests(self) -> int:
        """Requests in the line for a seat, or seated."""
        return self.num_running + self.num_waiting

    def add(self, request: Request) -> None:
        """Queue a request. It must fit the pool when alone (checked where rows are parsed)."""
        self.waiting.come(request)

    def _line(self) -> list[Request]:
        return self.waiting.line(self.num_ordinary)

    # -- schedule ------------------------------------------------------------------------------------------------

    def schedule(self, tick: int, admit: bool = True) -> Plan:
        """The plan of this tick; empty if nothing can run. Its requests are in flight until `commit`.

        Without `admit` nobody who waits gets a seat; prompts that have one go on.
        """
        if len(self._ring) == self.limits.slots:
            self._mature(self._ring.popleft())
        plan = Plan(tick)
        if not self.limits.exclusive:
            self._plan_decodes(plan)
            self._plan_prompts(plan, admit)
        else:
            self._plan_prompts(plan, admit)
            if not plan.requests:
                self._plan_decodes(plan)
        plan.cleared = self.pool.take_unclean()
        plan.finalise(self._row_counts, self._mixed_counts)
        self._ring.append(plan)
        return plan

    def _mature(self, plan: Plan) -> None:
        """Let the requests go on that got a token from a plan of N ticks ago, unless it is the last they may have.

        One that waits for this token and whose plan isn't committed yet goes on when it is. One without a seat was
        spoilt, and waits to be admitted again.
        """
        for request in plan.sampled:
            if request.scheduled >= request.full_length:
                self._retire(request)
            elif not (request.retired or request.seat < 0 or self._awaits_token(request)):
                self.ready.append(request)

    @staticmethod
    def _awaits_token(request: Request) -> bool:
        return request.waits_for_token and request.scheduled == request.num_tokens

    def _retire(self, request: Request) -> None:
        if not request.retired:
            request.retired = True
            self.num_decoding -= 1
            if request in self.ready:
                self.ready.remove(request)

    def _plan_decodes(self, plan: Plan) -> None:
        """Choose ready requests, least recently run first; preempt where the pool is empty."""
        chosen: list[Request] = []
        passed_over: list[Request] = []
        cap, size = self._decode_cap(), self.pool.block_size
        while self.ready and len(chosen) < cap:
            request = self.ready.popleft()
            has_place = request.scheduled < len(request.blocks) * size
            if has_place or self._take_block(request, chosen, passed_over, plan):
                chosen.append(request)
            elif request.seat >= 0:
                passed_over.append(request)
        self.ready.extendleft(reversed(passed_over))
        plan.add_decodes(chosen)
        for request in chosen:
            request.scheduled += 1
            request.in_flight += 1
            if request.scheduled % size == 0:
                register(request, self.pool)

    def _decode_cap(self) -> int:
        """Rows for this slot: an equal share of all decodes, so that 8 requests in 2 slots run 4/4 and not 8/0."""
        if not self.limits.balanced:
            return self.limits.decode_rows
        return min(self.limits.decode_rows, ceil_div(self.num_decoding, self.limits.slots))

    def _take_block(self, request: Request, chosen: list[Request], passed_over: list[Request], plan: Plan) -> bool:
        """Take the block that the next token of `request` starts, if one is to be had."""
        while not self.pool.num_free:
            if (victim := self._victim(request, [*chosen, *passed_over])) is None:
                return False
            if victim in chosen:
                chosen.remove(victim)
                plan.new_blocks = [entry for entry in plan.new_blocks if entry[0] != victim.seat]
            if victim in passed_over:
                passed_over.remove(victim)
            self._preempt(victim)
            if victim is request:
                return False
        plan.new_blocks.append((request.seat, len(request.blocks), block := self.pool.pop(request.alone)))
        request.blocks.append(block)
        return True

    def _victim(self, request: Request, considered: list[Request]) -> Request | None:
        """Whom to preempt so that `request` can go on: the last in the order of admission that isn't in flight.

        None: there is nobody behind `request`, but others are in flight; let it wait for their commits first.
        """
        candidates = [r for r in (request, *considered, *self.ready, *self.prefilling) if not r.in_flight]
        victim = max(candidates, key=self._order, default=request)
        if self._order(victim) <= self._order(request) and self.num_running > len(candidates):
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
        self.waiting.add(request)

    def _plan_prompts(self, plan: Plan, admit: bool) -> None:
        """Chunks of seated prompts first, then of newly admitted ones, while budget, seats and blocks last."""
        budget = min(self.limits.max_num_batched_tokens - plan.num_decodes, self._prompt_share(admit))
        places = self.limits.prefill_batch if self.limits.exclusive else self.limits.max_num_seqs
        queue = iter(list(self.prefilling))
        while budget > 0 and places > 0:
            request = next(queue, None) or (self._admit(plan) if admit else None)
            if request is None:
                break
            count = min(request.num_tokens - request.scheduled, budget)
            plan.add_chunk(request, count)
            request.scheduled += count
            request.in_flight += 1
            register(request, self.pool)
            if request.scheduled == request.num_tokens:
                self.prefilling.remove(request)
                self.num_decoding += 1
            budget -= count
            places -= 1

    def _prompt_share(self, admit: bool) -> int:
        """Prompt tokens for this plan: a share of those that wait, so that micro-batches take about equal time.

        Source: token throttling of gLLM (arXiv 2504.14775), without its KV term: admission reserves a prompt's blocks.
        In whole blocks, so that few shapes of forwards occur.
        """
        if not self.limits.prefill_spread or self.limits.exclusive:
            return self.limits.max_num_batched_tokens
        seated = [*self.prefilling, *self._line()[: len(self._free_seats) if admit else 0]]
        pending = sum(request.num_tokens - request.scheduled for request in seated)
        size = self.pool.block_size
        share = max(self.limits.prefill_min, pending // self.limits.prefill_spread)
        return round_up(share, size)

    def _admit(self, plan: Plan) -> Request | None:
        """Seat the first waiting request if all blocks of its prompt are to be had; it may not jump the queue."""
        if not (line := self._line()) or not self._free_seats or len(plan.new_blocks) >= MOST_NEW_BLOCKS:
            return None
        request = line[0]
        shared = known_prefix(request, self.pool)
        needed = ceil_div(request.num_tokens, self.pool.block_size) - len(shared)
        if needed > self.pool.num_free - self.pool.num_idle(shared):
            return None
        self.waiting.pop(line)
        self.num_ordinary += not request.aside
        self.pool.share(shared)
        request.blocks = shared + [self.pool.pop(request.alone) for _ in range(needed)]
        request.seat = self._free_seats.pop()
        request.num_registered = len(shared)
        request.scheduled = len(shared) * self.pool.block_size
        plan.new_blocks.extend((request.seat, index, block) for index, block in enumerate(request.blocks))
        self.prefilling.append(request)
        if self.pool.caching:
            self.counters.queried_tokens += request.num_tokens
            self.counters.cached_tokens += request.scheduled
        return request

    # -- commit --------------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, tokens: Sequence[int], finished: Sequence[bool]) -> list[Request]:
        """Take back the oldest plan in flight, with one token and one verdict for each of `plan.sampled`.

        A request with NO_TOKEN that doesn't finish with it is computed once more.

        Returns:
            The requests that finish with it. What is said of one that finished or was spoilt earlier is passed over.
        """
        for request in plan.requests:
            request.in_flight -= 1
        done, given = [], 0
        matured = not self._ring or plan.tick < self._ring[0].tick
        for request, token, ends in zip(plan.sampled, tokens, finished, strict=True):
            if not (request.finished or request.spoilt):
                given += self._give(request, token)
                if not (ends or request.spoilt):
                    if matured and request.waits_for_token and not request.retired:
                        self.ready.append(request)
                    continue
                self._retire(request)
                if ends:
                    request.finished = True
                    done.append(request)
            if not request.in_flight:
                self._leave(request)
        self.counters.output_tokens += given
        return done

    def _give(self, request: Request, token: int) -> bool:
        """Append a token to a request; false for NO_TOKEN, which spoils it."""
        if token == NO_TOKEN:
            request.spoilt = True
            return False
        request.output.append(token)
        if request.num_tokens % self.pool.block_size == 0:
            register(request, self.pool)
        return True

    def _leave(self, request: Request) -> None:
        """Take the seat of a request that is finished or spoilt; the latter waits to be computed once more, alone."""
        self._unseat(request)
        if not request.finished:
            request.spoilt = request.retired = False
            request.alone = True
            self.waiting.add(request)

    def _unseat(self, request: Request) -> None:
        assert request.in_flight == 0, "a request in flight keeps its blocks"
        self.pool.release(request.blocks, request.spoilt)
        self._free_seats.append(request.seat)
        self.num_ordinary -= not request.aside
        request.blocks, request.seat, request.scheduled, request.num_registered = [], -1, 0, 0

    def _order(self, request: Request) -> tuple[int, int]:
        return (request.priority if self.limits.by_priority else 0, request.turn)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self, in_flight: Sequence[Plan]) -> None:
        """Assert that every request is in one place and every block is accounted for, given the plans in flight."""
        flying = {id(r): r for plan in in_flight for r in plan.requests}
        seated = {id(r): r for r in [*flying.values(), *self.prefilling, *self.ready]}
        waiting = list(self.waiting)
        for request in seated.values():
            assert request.in_flight == sum(request in plan.requests for plan in in_flight)
            assert request.seat >= 0 and request not in waiting
            assert len(request.blocks) * self.pool.block_size >= request.scheduled
            assert not request.retired or (request.in_flight and request not in self.ready)
            assert request.retired or not request.finished
        assert not any(request in plan.requests for plan in self._ring for request in self.ready)
        assert self.limits.lookahead or not any(request.in_flight for request in self.ready)
        assert not any(request.in_flight for request in self.ready if request.waits_for_token)
        assert len({r.seat for r in seated.values()}) == len(seated) == self.num_running
        assert self.num_ordinary == sum(not request.aside for request in seated.values())
        retired = sum(request.retired for request in seated.values())
        assert self.num_decoding == self.num_running - len(self.prefilling) - retired
        self.pool.check([request.blocks for request in seated.values()])
