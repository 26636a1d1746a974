"""Long prompts stand aside while ordinary requests run, and nobody waits for ever."""

import random

import pytest

from spmd.schedule.request import Request
from spmd.schedule.waiting import MOST_ASIDE
from tests.support.simulation import Simulation, make_request, make_scheduler, run_all

LONG = 400  # tokens; others have 3


def rows(long_at: list[int], count: int) -> list[Request]:
    return [make_request(i, LONG if i in long_at else 3, max_tokens=9) for i in range(count)]


def order_of_seats(simulation: Simulation) -> list[int]:
    """Rows by when they were planned first."""
    seen: dict[int, None] = {}
    for plan in simulation.plans:
        seen.update(dict.fromkeys(request.index for request in plan.requests))
    return list(seen)


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("long_at", [[0], [3, 4, 20], [39]])
def test_a_prompt_far_longer_than_others_runs_when_they_are_done(pp: int, lookahead: int, long_at: list[int]) -> None:
    scheduler = make_scheduler(8, pp, num_blocks=400, long_prompt=64, lookahead=lookahead)
    simulation = run_all(scheduler, rows(long_at, 40))
    assert order_of_seats(simulation)[-len(long_at) :] == long_at
    for plan in simulation.plans:
        assert len({request.prompt_len for request in plan.requests}) < 2, "none runs beside an ordinary one"


@pytest.mark.parametrize("long_prompt", [0, LONG])
def test_it_runs_in_its_turn_where_none_is_to_wait_or_one_plan_can_hold_it(long_prompt: int) -> None:
    simulation = run_all(make_scheduler(8, num_blocks=400, long_prompt=long_prompt), rows([3], 20))
    assert order_of_seats(simulation) == list(range(20))


def test_where_long_prompts_are_usual_none_waits_for_others() -> None:
    scheduler = make_scheduler(8, num_blocks=1000, long_prompt=64)
    simulation = run_all(scheduler, rows(list(range(0, 40, 2)), 40))
    assert order_of_seats(simulation) == list(range(40))


def test_beside_long_ones_may_run_few_that_are_still_at_it() -> None:
    scheduler = make_scheduler(32, 1, num_blocks=800, long_prompt=64)
    ordinary = [make_request(i, 3, max_tokens=(40, 200, 200)[i] if i < 3 else 9) for i in range(32)]
    simulation = Simulation(scheduler).add([*ordinary, make_request(32, LONG)])
    while simulation.tick().requests[-1].prompt_len != LONG:
        assert scheduler.num_running > 2 or ordinary[0].in_flight
    assert ordinary[0].finished and not ordinary[1].finished, "with two of 32 seats taken the long one may"
    simulation.run()


def test_a_bounded_number_of_rows_stands_aside_and_then_the_first_goes_on_in_its_turn() -> None:
    scheduler = make_scheduler(4, 1, num_blocks=700, long_prompt=64)
    many = MOST_ASIDE + 2
    ordinary = [make_request(i, 3, max_tokens=5) for i in range(10 * many)]
    behind = [make_request(20 * many + i, 3, max_tokens=5) for i in range(10 * many)]
    simulation = Simulation(scheduler).add(ordinary).add(make_request(10 * many + i, LONG) for i in range(many))
    simulation.add(behind).run(20000)
    order = order_of_seats(simulation)
    assert order[10 * many : 10 * many + 2] == [10 * many, 10 * many + 1], "these two of them jump no queue"
    assert order[-MOST_ASIDE:] == [10 * many + i for i in range(2, many)], "the others let all go first"


def test_all_choices_of_a_long_prompt_stand_aside_as_one_row() -> None:
    scheduler = make_scheduler(8, num_blocks=400, long_prompt=64)
    long = make_request(3, LONG)
    choices = [Request(3, choice, long.prompt, long.params) for choice in range(3 * MOST_ASIDE)]
    others = [make_request(i, max_tokens=30) for i in range(40) if i != 3]
    simulation = Simulation(scheduler).add([*others[:3], *choices, *others[3:]])
    for _ in range(20):
        simulation.tick()
    assert scheduler.waiting.rows_aside == 1 and len(scheduler.waiting.aside) == len(choices)
    simulation.run(20000)
    assert order_of_seats(simulation)[-1] == 3


def test_a_long_one_that_lost_its_seat_waits_as_before() -> None:
    scheduler = make_scheduler(4, 1, num_blocks=130, block_size=4, long_prompt=64)
    simulation = Simulation(scheduler).add([make_request(i, 3) for i in range(4)])
    simulation.add([make_request(4, 380, max_tokens=60), make_request(5, 380, max_tokens=60, waits=True)])
    finished = simulation.run()
    assert sorted(request.index for request in finished) == list(range(6))


@pytest.mark.parametrize("seed", range(30))
def test_random_mixtures_all_end_with_their_tokens(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(
        rng.choice([2, 8, 33]), pp := rng.randint(1, 2), lookahead=rng.randint(0, 1), long_prompt=rng.choice([0, 64]),
        num_blocks=rng.choice([150, 400]), exclusive=rng.random() < 0.3, prefill_spread=rng.choice([0, 4 * pp]),
    )  # fmt: skip
    lengths = [rng.choice([1, 3, 9, 9, 9, 300]) for _ in range(rng.randint(1, 60))]
    requests = [make_request(i, length, max_tokens=rng.randint(1, 30)) for i, length in enumerate(lengths)]
    run_all(scheduler, requests)
