"""Commits that lag: rows are planned before the host knows their input token, or that their request has ended."""

from collections.abc import Callable

import pytest

from tests.support.simulation import Simulation, expected_output, make_request, make_scheduler, run_all

LATE = [1, 2, 3]
STOPS = tuple(range(0, 89, 4))  # a token in four ends a request that has them


def decode(simulation: Simulation, until: Callable[[], object]) -> None:
    """Tick until a condition holds."""
    for _ in range(500):
        if until():
            return
        simulation.tick()
    raise AssertionError("it never held")


@pytest.mark.parametrize("lookahead", LATE)
def test_a_request_runs_at_every_turn_of_the_ring_while_commits_lag(lookahead: int) -> None:
    simulation = run_all(make_scheduler(4, 1, lookahead=lookahead), [make_request(0, max_tokens=20)])
    assert [len(plan.sampled) for plan in simulation.plans] == [1] * 20 + [0] * lookahead + [0]


@pytest.mark.parametrize("lookahead", [0, *LATE])
@pytest.mark.parametrize("async_depth", [0, 1])
def test_positions_count_rows_that_are_not_committed(async_depth: int, lookahead: int) -> None:
    scheduler = make_scheduler(8, 2, async_depth, max_num_batched_tokens=8, lookahead=lookahead)
    simulation = run_all(scheduler, [make_request(i, 5 + 4 * i, 9) for i in range(6)])
    positions: dict[int, list[int]] = {}
    for plan in simulation.plans:
        for request, position in zip(plan.sampled, plan.sample_positions, strict=True):
            positions.setdefault(request.index, []).append(position)
    assert positions == {i: [5 + 4 * i + place for place in range(9)] for i in range(6)}


@pytest.mark.parametrize("lookahead", LATE)
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_ghost_rows_yield_no_token(pp: int, lookahead: int) -> None:
    requests = [make_request(i, 3, 40, stop=STOPS) for i in range(40)]
    simulation = run_all(make_scheduler(6, pp, lookahead=lookahead), requests)
    stopped = sum(len(request.output) < 40 for request in requests)
    assert 0 < simulation.ghosts <= stopped * -(-lookahead // pp)
    tokens = sum(len(request.output) for request in requests)
    assert sum(len(plan.sampled) for plan in simulation.plans) == tokens + simulation.ghosts


@pytest.mark.parametrize("lookahead", LATE)
def test_seat_and_blocks_are_kept_until_the_last_ghost_row_is_committed(lookahead: int) -> None:
    scheduler = make_scheduler(1, 1, num_blocks=30, block_size=1, lookahead=lookahead)
    request = make_request(0, 3, 20, stop=tuple(range(89)))  # its first token ends it
    simulation = Simulation(scheduler).add([request, make_request(1)])
    decode(simulation, lambda: simulation.finished)
    assert simulation.finished == [request] and list(request.output) == expected_output(request)
    for ghosts_in_flight in range(lookahead, 0, -1):
        assert request.in_flight == ghosts_in_flight
        assert request.seat == 0 and len(request.blocks) == 3 + lookahead
        assert scheduler.pool.num_free == 29 - len(request.blocks)
        simulation.tick()
    assert request.seat == -1 and not request.blocks
    assert simulation.ghosts == lookahead
    assert [r.index for r in simulation.ring[-1].requests] == [1], "the seat is used again at once"


@pytest.mark.parametrize("lookahead", LATE)
@pytest.mark.parametrize("balanced", [True, False])
def test_requests_that_end_by_length_are_planned_as_if_commits_were_in_time(balanced: bool, lookahead: int) -> None:
    """No row is wasted, and what is left is shared anew at the same tick."""

    def rows(lookahead: int) -> list[list[int]]:
        scheduler = make_scheduler(16, 2, num_blocks=400, balanced=balanced, lookahead=lookahead)
        simulation = run_all(scheduler, [make_request(i, 3, 8 + 7 * (i % 3) + i) for i in range(16)])
        assert simulation.ghosts == 0
        return simulation.rows[: max(plan.tick for plan in simulation.plans if plan.requests) + 1]

    assert rows(lookahead) == rows(0)


@pytest.mark.parametrize("lookahead", LATE)
def test_what_is_left_is_shared_anew_after_a_stop_became_known(lookahead: int) -> None:
    everything = tuple(range(89))
    requests = [make_request(i, max_tokens=60, stop=() if i % 2 else everything) for i in range(16)]
    simulation = Simulation(make_scheduler(16, 2, num_blocks=400, lookahead=lookahead)).add(requests)
    decode(simulation, lambda: len(simulation.finished) == 8)
    for _ in range(4):
        simulation.tick()
    assert [len(simulation.tick().requests) for _ in range(4)] == [4, 4, 4, 4]


@pytest.mark.parametrize("lookahead", LATE)
@pytest.mark.parametrize("by_priority", [False, True])
def test_an_empty_pool_waits_for_commits_and_then_preempts(by_priority: bool, lookahead: int) -> None:
    """With one slot every ready request is in flight when the pool is empty."""
    scheduler = make_scheduler(3, 1, num_blocks=9, block_size=2, lookahead=lookahead, by_priority=by_priority)
    requests = [make_request(i, 4, 10, priority=-i) for i in range(3)]
    simulation = Simulation(scheduler).add(requests)
    waited = 0
    while scheduler.num_requests:
        before = scheduler.counters.preemptions
        plan = simulation.tick()
        waited += bool(scheduler.ready) and not plan.requests and scheduler.counters.preemptions == before
    assert waited and scheduler.counters.preemptions > 0
    first = simulation.finished[0]
    assert first is requests[-1 if by_priority else 0], "the first in the order is never preempted"
    assert all(list(request.output) == expected_output(request) for request in requests)


@pytest.mark.parametrize("lookahead", [0, *LATE])
def test_a_block_can_be_shared_once_its_tokens_are_committed(lookahead: int) -> None:
    scheduler = make_scheduler(4, 1, block_size=4, lookahead=lookahead)
    first = make_request(0, 2, 30)
    simulation = Simulation(scheduler).add([first])
    for _ in range(12):
        simulation.tick()
        known = min(len(first.output) + 2, first.scheduled) // 4
        assert scheduler.pool.find(first.hashes) == first.blocks[:known]
    assert first.scheduled - first.num_tokens == lookahead
    again = make_request(1, [*first.tokens(), 1], 3)
    simulation.add([again]).run()
    assert scheduler.counters.cached_tokens == (again.prompt_len - 1) // 4 * 4 >= 8
    assert list(again.output) == expected_output(again)
