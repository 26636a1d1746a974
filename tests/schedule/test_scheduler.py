import random
import subprocess
import sys
from typing import Any

import pytest

from spmd.parallel.replicas import Alone
from spmd.schedule.balance import Rules
from spmd.schedule.digests import DigestChain
from spmd.schedule.request import NO_TOKEN, Request
from tests.support.simulation import (
    Simulation,
    expected_output,
    make_request,
    make_scheduler,
    next_token,
    run_all,
)


def decode_only(simulation: Simulation, first_tick: int = 0) -> list[list[int]]:
    return [rows for plan, rows in zip(simulation.plans, simulation.rows, strict=True) if plan.tick >= first_tick]


def warmed_up(simulation: Simulation, num_requests: int) -> None:
    """Tick until every request decodes; a prompt that just ended still waits for its commit."""
    while simulation.scheduler.num_decoding < num_requests:
        simulation.tick()
    for _ in range(simulation.scheduler.limits.slots):
        simulation.tick()


def test_imports_no_torch() -> None:
    code = "import sys; import spmd.schedule.scheduler, spmd.schedule.balance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("max_num_seqs", "pp"), [(17, 2), (10, 4), (5, 3)])
@pytest.mark.parametrize("async_depth", [0, 1, 2])
def test_every_request_progresses_whatever_the_remainder(max_num_seqs: int, pp: int, async_depth: int) -> None:
    scheduler = make_scheduler(max_num_seqs, pp, async_depth)
    simulation = Simulation(scheduler).add(make_request(i, max_tokens=200) for i in range(max_num_seqs))
    warmed_up(simulation, max_num_seqs)
    before = dict.fromkeys(range(max_num_seqs), 0)
    for _ in range(12 * (pp + async_depth)):
        for request in simulation.tick().sampled:
            before[request.index] += 1
    assert min(before.values()) >= max(before.values()) - 2


@pytest.mark.parametrize(
    ("running", "split"), [(1, [1, 0]), (7, [4, 3]), (8, [4, 4]), (9, [5, 4]), (15, [8, 7]), (16, [8, 8])]
)
def test_decodes_are_shared_equally_among_the_slots(running: int, split: list[int]) -> None:
    simulation = Simulation(make_scheduler(16, 2)).add(make_request(i, max_tokens=60) for i in range(running))
    warmed_up(simulation, running)
    sizes = [len(simulation.tick().requests) for _ in range(8)]
    assert sorted(sizes[:2], reverse=True) == split
    assert sizes == sizes[:2] * 4


def test_what_is_left_is_split_again_after_a_group_ends() -> None:
    requests = [make_request(i, max_tokens=60 if i % 2 else 8) for i in range(16)]
    simulation = Simulation(make_scheduler(16, 2)).add(requests)
    while len(simulation.finished) < 8:
        simulation.tick()
    for _ in range(4):
        simulation.tick()
    assert [len(simulation.tick().requests) for _ in range(4)] == [4, 4, 4, 4]


def test_deeper_rings_hold_smaller_batches() -> None:
    simulation = Simulation(make_scheduler(128, 2, 1, num_blocks=2000, max_num_batched_tokens=512))
    simulation.add(make_request(i, max_tokens=100) for i in range(128))
    warmed_up(simulation, 128)
    for _ in range(6):
        simulation.tick()
    assert sorted(len(simulation.tick().requests) for _ in range(3)) == [42, 43, 43]


def test_decode_batches_are_padded_to_the_cap_or_a_bucket() -> None:
    scheduler = make_scheduler(16, 2, decode_buckets=(2, 4))
    simulation = Simulation(scheduler).add(make_request(i, max_tokens=20) for i in range(3))
    warmed_up(simulation, 3)
    plans = [simulation.tick() for _ in range(4)]
    assert {(plan.num_decodes, plan.padded_decodes) for plan in plans} == {(2, 2), (1, 2)}
    plain = Simulation(make_scheduler(16, 2)).add([make_request(0, max_tokens=9)])
    warmed_up(plain, 1)
    assert {plan.padded_decodes for plan in (plain.tick() for _ in range(2))} == {0, 8}


def test_one_request_then_a_burst_then_nothing_for_long() -> None:
    scheduler = make_scheduler(8, 4)
    simulation = Simulation(scheduler).add([make_request(0)])
    simulation.run()
    for _ in range(3000):
        assert simulation.tick().num_rows == 0
    simulation.add(make_request(i) for i in range(1, 30)).run()
    assert len(simulation.finished) == 30


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("length", [1, 16, 17, 32, 33, 48])
def test_middle_chunks_sample_nothing(length: int, exclusive: bool) -> None:
    scheduler = make_scheduler(8, 2, max_num_batched_tokens=16, exclusive=exclusive)
    simulation = run_all(scheduler, [make_request(0, length, 2)])
    chunks = [plan for plan in simulation.plans if plan.num_prompt_tokens]
    assert [plan.num_prompt_tokens for plan in chunks] == [16] * (length // 16) + [length % 16] * bool(length % 16)
    assert [len(plan.sampled) for plan in chunks] == [0] * (len(chunks) - 1) + [1]
    assert [plan.tick for plan in chunks] == list(range(len(chunks))), "chunks follow each other in consecutive slots"


@pytest.mark.parametrize("exclusive", [False, True])
def test_full_prefix_hit_computes_the_last_token_alone(exclusive: bool) -> None:
    scheduler = make_scheduler(8, 2, exclusive=exclusive)
    prompt = list(range(9))  # two full blocks and the token that must be computed
    simulation = run_all(scheduler, [make_request(0, prompt, 3)])
    again = make_request(1, prompt, 3)
    simulation.add([again])
    plan = simulation.tick()
    assert (plan.num_prompt_tokens, plan.starts, scheduler.counters.cached_tokens) == (1, [8], 8)
    assert plan.sampled == [again]


@pytest.mark.parametrize("async_depth", [0, 1, 2])
@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_preempted_requests_give_the_same_tokens(
    async_depth: int, lookahead: int, exclusive: bool, caching: bool
) -> None:
    sizes: dict[str, Any] = {"num_blocks": 14, "max_num_batched_tokens": 16, "exclusive": exclusive, "caching": caching}
    scheduler = make_scheduler(8, 2, async_depth, lookahead=lookahead, **sizes)
    simulation = run_all(scheduler, [make_request(i, 3 + i % 5, 20 + i) for i in range(12)])
    assert scheduler.counters.preemptions > 0
    assert len(simulation.plans) < 2000


def test_a_request_in_flight_is_never_preempted() -> None:
    scheduler = make_scheduler(4, 2, num_blocks=9, block_size=2)
    simulation = Simulation(scheduler).add(make_request(i, 3, 9) for i in range(4))
    while scheduler.num_requests:
        flying = {id(r): list(r.blocks) for plan in list(simulation.ring)[1:] for r in plan.requests}
        by_id = {id(r): r for plan in simulation.ring for r in plan.requests}
        simulation.tick()
        for key, blocks in flying.items():
            assert by_id[key].blocks[: len(blocks)] == blocks
    assert scheduler.counters.preemptions > 0


def test_a_preempted_decode_gives_its_row_back() -> None:
    scheduler = make_scheduler(4, 1, num_blocks=7, block_size=2, balanced=False)
    simulation = Simulation(scheduler).add(make_request(i, 2, 11) for i in range(4))
    seen = 0
    while scheduler.num_requests:
        before = scheduler.counters.preemptions
        plan = simulation.tick()
        if scheduler.counters.preemptions > before:
            seen += 1
            assert all(r.seat >= 0 and r.blocks for r in plan.requests)
            assert len(plan.requests) == len(set(map(id, plan.requests)))
            assert {seat for seat, _, _ in plan.new_blocks} <= {r.seat for r in plan.requests}
    assert seen


def test_blocks_are_cached_only_when_the_plan_is_final() -> None:
    scheduler = make_scheduler(2, 1, num_blocks=5, block_size=2)
    simulation = Simulation(scheduler).add([make_request(0, 3, 6), make_request(1, 2, 6)])
    simulation.run()
    assert scheduler.counters.preemptions > 0
    for request in simulation.finished:
        assert list(request.output) == expected_output(request)


def test_a_row_reused_before_the_packet_lands() -> None:
    scheduler = make_scheduler(2, 2, async_depth=2)
    simulation = run_all(scheduler, [make_request(i, 3, 1 + i % 3) for i in range(20)])
    assert max(plan.num_decodes for plan in simulation.plans) == 1


def test_prompt_chunks_of_one_request_are_in_flight_together() -> None:
    scheduler = make_scheduler(8, 4, max_num_batched_tokens=8)
    simulation = Simulation(scheduler).add([make_request(0, 30)])
    for _ in range(4):
        simulation.tick()
    assert simulation.ring[0].requests[0].in_flight == 4


def test_exclusive_plans_never_mix_and_hold_prefill_batch_prompts() -> None:
    scheduler = make_scheduler(16, 2, exclusive=True, prefill_batch=2)
    simulation = run_all(scheduler, [make_request(i) for i in range(20)])
    for plan in simulation.plans:
        assert not (plan.num_decodes and plan.num_prompt_tokens)
        assert len(plan.requests) <= 2 or plan.num_decodes


def test_prefill_spread_makes_prompts_trickle() -> None:
    scheduler = make_scheduler(16, 2, num_blocks=400, max_num_batched_tokens=512, prefill_spread=4)
    simulation = run_all(scheduler, [make_request(i, 32) for i in range(16)])
    prompt_tokens = [plan.num_prompt_tokens for plan in simulation.plans if plan.num_prompt_tokens]
    assert prompt_tokens[:2] == [128, 96]
    assert prompt_tokens[-1] <= 4


def test_priority_runs_before_the_order_of_the_input() -> None:
    for by_priority, order in ((False, [0, 1, 2]), (True, [2, 1, 0])):
        scheduler = make_scheduler(1, 1, by_priority=by_priority)
        simulation = run_all(scheduler, [make_request(i, priority=-i) for i in range(3)])
        assert [request.index for request in simulation.finished] == order


def test_prefix_is_shared_by_requests_of_one_plan() -> None:
    scheduler = make_scheduler(8, 2)
    prompt = list(range(40, 53))
    run_all(scheduler, [make_request(i, prompt, 4) for i in range(6)])
    assert scheduler.counters.cached_tokens == 5 * 12
    assert scheduler.counters.queried_tokens == 6 * 13


@pytest.mark.parametrize("seed", range(80))
def test_random_workloads_keep_every_invariant_on_equal_plans(seed: int) -> None:
    """Two copies fed alike plan alike, whatever the sizes; requests get exactly their tokens."""
    rng = random.Random(seed)
    pp = rng.randint(1, 4)
    sizes: dict[str, Any] = {
        "max_num_seqs": rng.randint(pp, 20),
        "pp": pp,
        "async_depth": rng.randint(0, 2),
        "lookahead": seed % 4,
        "num_blocks": rng.randint(14, 60),
        "block_size": rng.choice([1, 3, 4]),
        "max_num_batched_tokens": rng.randint(20, 40),
        "caching": rng.random() < 0.7,
        "exclusive": rng.random() < 0.4,
        "prefill_batch": rng.randint(1, 3),
        "prefill_spread": rng.choice([0, 0, 3]),
        "by_priority": rng.random() < 0.3,
        "balanced": rng.random() < 0.8,
    }
    longest = (sizes["num_blocks"] - 1) * sizes["block_size"]
    shape = []
    for i in range(50):
        prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, min(12, longest - 1)))]
        stop = tuple(range(rng.choice([0, 0, 20])))
        shape.append((i, prompt, rng.randint(1, min(9, longest - len(prompt))), rng.randint(0, 2), stop))
    copies = []
    for _ in range(2):
        simulation = run_all(make_scheduler(**sizes), [make_request(*args) for args in shape])
        copies.append([*map(DigestChain().plan, simulation.plans)])
    assert copies[0] == copies[1]


class Gated(Alone):
    closed = False

    def admits(self, tick: int, running: int, waiting: int) -> bool:
        return not self.closed


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("prefill_spread", [0, 4])
def test_without_admission_seated_prompts_and_decodes_go_on(exclusive: bool, prefill_spread: int) -> None:
    limits: dict[str, Any] = {"max_num_batched_tokens": 8, "exclusive": exclusive, "prefill_spread": prefill_spread}
    gated = Gated(Rules(16))
    simulation = Simulation(make_scheduler(pp=1, **limits), replicas=gated)
    seated, late = make_request(0, prompt=20, max_tokens=9), make_request(1)
    simulation.add([seated]).tick()
    simulation.add([late])
    gated.closed = True
    for _ in range(1, 9):
        assert simulation.tick().requests == [seated]
    assert [*simulation.scheduler.waiting] == [late] and len(seated.output) > 0
    gated.closed = False
    assert sorted(request.index for request in simulation.run()) == [0, 1]


def test_a_spoilt_request_is_computed_once_more_in_cleared_blocks_and_its_old_ones_are_found_by_nobody() -> None:
    scheduler, prompt = make_scheduler(4, 1), [*range(9)]
    first, beside, later = (make_request(i, prompt, max_tokens=20) for i in range(3))
    scheduler.add(first)
    scheduler.add(beside)  # which finds the prefix of the first
    plan = scheduler.schedule(0)
    shared, given_back = first.blocks[:2], first.blocks[2:]
    assert beside.blocks[:2] == shared and not plan.cleared
    assert scheduler.commit(plan, [NO_TOKEN, 7], [False, False]) == []
    assert (first.seat, first.alone, list(first.output)) == (-1, True, [])
    scheduler.add(later)
    plan = scheduler.schedule(1)
    assert plan.starts[plan.requests.index(first)] == 0 and not {*first.blocks} & {*beside.blocks}
    assert {*plan.cleared} == {*given_back, *first.blocks}
    assert later.blocks[:2] == first.blocks[:2], "what is computed alone may be shared"
    scheduler.commit(plan, [7, 7, 7], [False, False, False])
    while len(first.blocks) < 4:
        plan = scheduler.schedule(plan.tick + 1)
        scheduler.commit(plan, [7] * len(plan.sampled), [False] * len(plan.sampled))
    assert plan.cleared == [first.blocks[3]]
    assert list(first.output)[:2] == [7, 7]


@pytest.mark.parametrize("seed", range(12))
def test_spoilt_requests_lose_no_token_however_plans_are_made(seed: int) -> None:
    rng = random.Random(seed)
    lookahead, pp, caching = rng.randrange(3), rng.choice([1, 2]), rng.random() < 0.7
    scheduler = make_scheduler(6, pp, rng.randrange(2), rng.choice([12, 60]), caching=caching, lookahead=lookahead)
    heads = [[*range(rng.randrange(1, 12))] for _ in range(2)]
    requests = [make_request(i, [*rng.choice(heads), i], rng.randrange(2, 16), waits=i % 7 == 0) for i in range(24)]
    spoilt = {rng.randrange(24): rng.randrange(6) for _ in range(12)}
    given = []

    def token(request: Request) -> int:
        if not request.alone and spoilt.get(request.index) == len(request.output) < request.params.max_tokens - 1:
            given.append(request.index)
            return NO_TOKEN
        return next_token(request)

    simulation = Simulation(scheduler).add(requests)
    simulation.results.token = token
    assert sorted(request.index for request in simulation.run()) == [*range(24)]
    assert all(list(request.output) == expected_output(request) for request in requests)
    assert given and {request.index for request in requests if request.alone} == {*given}


@pytest.mark.parametrize("lookahead", [0, 2])
def test_a_request_without_a_token_ends_and_gives_back_all_it_had(lookahead: int) -> None:
    scheduler = make_scheduler(4, 1, lookahead=lookahead)
    request = make_request(0, prompt=9, max_tokens=20)
    scheduler.add(request)
    plans = [scheduler.schedule(tick) for tick in range(1 + lookahead)]
    assert scheduler.commit(plans[0], [NO_TOKEN], [True]) == [request]
    for ghost in plans[1:]:
        assert scheduler.commit(ghost, [7] * len(ghost.sampled), [True] * len(ghost.sampled)) == []
    scheduler.check([])
    assert (scheduler.num_requests, scheduler.counters.output_tokens) == (0, 0)
    assert list(request.output) == [] and request.blocks == []
