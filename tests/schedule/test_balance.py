"""The rules one by one, and whole runs of real engines with a made-up stage and exchange, in random order."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spmd.api.rows import Job
from spmd.bench.balance import lognormal_jobs, make_job
from spmd.bench.simulation import Fleet
from spmd.parallel.replicas import Alone
from spmd.schedule.balance import EXHAUSTED, Balance, Demand, Gate, Load, Rules, Turns
from spmd.schedule.limits import Limits

GATES = ("off", "saturated", "near", "interval")


def load(running: int = 0, waiting: int = 0, **more: int) -> Load:
    return Load(**dict.fromkeys(Load._fields, 0) | {"running": running, "waiting": waiting} | more)


def rules(**changes: Any) -> Rules:
    return Rules(**{"max_num_seqs": 8, "dp": 2, "lag": 2} | changes)


def takers(each: list[Demand]) -> list[int]:
    """Which replica takes each of the rows that are wanted in this tick; every rank must know."""
    found = []
    while (own := [demand.next(0) for demand in each])[0] is not None:
        assert own.count(True) == 1
        found.append(own.index(True))
    assert own == [None] * len(each)
    return found


def everywhere(**changes: Any) -> list[Demand]:
    return [Demand(rules(**changes, dp_rank=replica)) for replica in range(changes.get("dp", 2))]


def see(each: list[Demand], *loads: Load) -> list[int]:
    for demand in each:
        demand.see(loads or None)
    return takers(each)


def test_the_first_tick_fills_the_seats_and_a_reserve_in_turn() -> None:
    assert see(everywhere(dp=3)) == [0, 1, 2] * 9
    assert see(everywhere(max_num_seqs=9)) == [0, 1] * 11
    assert see(everywhere(max_num_seqs=1)) == [0, 1] * 2


def test_by_priority_twice_as_many_rows_as_seats_are_looked_at() -> None:
    assert see(everywhere(by_priority=True)) == [0, 1] * 16


def test_rows_go_where_most_are_lacking() -> None:
    each = everywhere(dp=3)
    for _ in range(3):
        see(each)
    assert see(each, load(5, 1), load(7, 2), load(6, 0)) == [0, 2, 0, 2, 0, 2]
    assert see(each, load(8, 1), load(7, 2), load(8, 5)) == []


def test_ties_go_to_free_blocks_then_to_the_first() -> None:
    each = everywhere(dp=3, lag=0)
    see(each)
    assert see(each, *(load(8, free_blocks=blocks) for blocks in (5, 9, 9))) == [1, 2, 0]


def test_what_was_allotted_counts_until_loads_show_it() -> None:
    each = everywhere()
    assert [len(see(each)) for _ in range(3)] == [18, 0, 0]
    full, short = load(8, 1), load(7, 1)
    assert see(each, full, full) == []
    assert see(each, short, full) == [0]
    assert see(each, short, full) == [], "one tick ago"
    assert see(each, short, full) == [], "two"
    assert see(each, short, full) == [0], "three ticks later it would show: it is lacking again"


def test_waiting_requests_of_a_row_count_once_loads_tell_of_them() -> None:
    each = everywhere()
    for _ in range(3):
        see(each)
    assert see(each, load(8, 64), load(8, 0)) == [1]


def test_in_turn_each_reads_on_when_it_has_room() -> None:
    turns = Turns(rules(dp=3, dp_rank=1, share="static"))
    assert [turns.next(7) for _ in range(5)] == [False, True, False, False, True]
    assert turns.next(8) is None
    assert Turns(rules(by_priority=True)).next(15) is not None


def test_one_replica_takes_all_and_admits_at_once() -> None:
    alone = Alone(Rules(4))
    assert [alone.next_row(held) for held in (0, 3, 4)] == [True, True, None]
    assert alone.admits(1, running=3, waiting=1)
    assert [Alone(Rules(4, by_priority=True)).next_row(held) for held in (7, 8)] == [True, None]


def test_one_replica_knows_by_itself_when_it_is_over() -> None:
    for last, over in [
        (load(flags=EXHAUSTED), True),
        (load(running=1, flags=EXHAUSTED), False),
        (load(waiting=1, flags=EXHAUSTED), False),
        (load(), False),
        (load(running=1, stop=77), True),
    ]:
        alone = Alone(Rules(4))
        assert alone.report(last) is None
        assert (alone.over, alone.stopped, alone.loads) == (over, last.stop, (last,))


@pytest.mark.parametrize(
    ("gate", "others", "opens"),
    [
        ("saturated", 8, False),
        ("saturated", 7, True),
        ("near", 7, False),
        ("near", 6, True),
    ],
)
def test_a_gate_looks_at_all_replicas(gate: str, others: int, opens: bool) -> None:
    each = Gate(rules(gate=gate))
    assert each.open([load(3), load(others)], 1, running=3, waiting=1) == opens
    assert each.open((), 1, running=3, waiting=1), "nothing is known yet"
    assert each.frozen_ticks == (not opens)


def test_the_interval_gate_opens_at_the_same_ticks_everywhere() -> None:
    gate = Gate(rules(gate="interval", interval=3))
    assert [gate.open([load(8), load(8)], tick, 3, 1) for tick in range(5)] == [True, False, False, True, False]


def test_only_ticks_that_held_somebody_back_are_frozen() -> None:
    gate, loads = Gate(rules(gate="saturated")), [load(8), load(8)]
    assert not gate.open(loads, 1, running=3, waiting=0)
    assert not gate.open(loads, 1, running=8, waiting=5)
    assert gate.frozen_ticks == 0


def test_patience_ends_and_an_idle_replica_has_none() -> None:
    gate, loads = Gate(rules(gate="saturated", patience=3)), [load(8), load(8)]
    assert [gate.open(loads, 1, 3, 1) for _ in range(8)] == [False, False, False, True] * 2
    assert gate.frozen_ticks == 6
    assert gate.open(loads, 1, running=0, waiting=1)


def test_it_is_over_when_all_say_so() -> None:
    done, busy, reading = load(flags=EXHAUSTED), load(running=1, flags=EXHAUSTED), load()
    balance = Balance(rules())
    for loads, over in [((done, busy), False), ((done, reading), False), ((done, done), True)]:
        balance.see(loads)
        assert balance.over == over


def test_mixed_ticks_have_prompts_here_and_only_decodes_there() -> None:
    prompts, decodes, idle = load(prompt_tokens=5), load(decode_rows=3), load()
    both = load(prompt_tokens=5, decode_rows=3)
    balance = Balance(rules())
    for loads, mixed in [
        ((prompts, decodes), 1),
        ((both, decodes), 2),
        ((prompts, both), 2),
        ((prompts, idle), 2),
        ((decodes, decodes), 2),
        ((decodes, idle), 2),
    ]:
        balance.see(loads)
        assert balance.mixed_ticks == mixed


# -- whole runs ------------------------------------------------------------------------------------------------------


def finished(fleet: Fleet, rows: int) -> list[int]:
    """Rows answered by each replica, after asserting what holds for every run."""
    assert len(set(fleet.ticks)) == 1, "the same tick is the last"
    assert {len(written) for written in fleet.board.written} == {fleet.ticks[0]}, "and everybody reported as many loads"
    for replica in fleet.replicas:
        assert replica.engine.exhausted and not replica.scheduler.num_requests
        assert sorted(request.index for request in replica.results.finished) == replica.results.opened
    answered = [len(replica.results.finished) for replica in fleet.replicas]
    assert answered == [replica.engine.rows for replica in fleet.replicas]
    assert sum(answered) == rows, "each row is answered once"
    return answered


def rows_of(*lengths: int) -> Callable[[], list[Job]]:
    return lambda: [make_job(index, 5, length) for index, length in enumerate(lengths)]


@pytest.mark.parametrize("share", ["dynamic", "static"])
def test_rows_of_many_choices_are_dealt_by_their_requests(share: str) -> None:
    def with_choices(job: Job) -> Job:
        return replace(job, requests=[replace(job.requests[0], choice=choice) for choice in range(64)])

    fleet = Fleet(Rules(128, dp=2, share=share), lambda: [with_choices(make_job(i, 5, 3)) for i in range(40)])
    for rank in range(2):
        fleet.tick(rank)
    assert [replica.scheduler.num_requests for replica in fleet.replicas] == [192 if share == "dynamic" else 128] * 2


@pytest.mark.parametrize("seed", range(100))
def test_the_same_number_of_exchanges_in_any_order(seed: int) -> None:
    rng = random.Random(seed)
    seats, slots = rng.choice([1, 2, 3, 8]), rng.randint(1, 3)
    each = Rules(
        max(seats, slots),
        by_priority=rng.random() < 0.2,
        dp=rng.randint(2, 5),
        share=rng.choice(["dynamic", "dynamic", "static"]),
        gate=rng.choice(GATES if max(seats, slots) > 1 else ["off", "saturated", "interval"]),
        interval=rng.randint(1, 4),
        patience=rng.choice([1, 5, 64]),
        lag=rng.randrange(6),
    )
    limits = Limits(
        each.max_num_seqs,
        max_num_batched_tokens=rng.choice([8, 64]),
        decode_rows=each.max_num_seqs // slots,
        slots=slots,
        lookahead=rng.randrange(2),
        exclusive=rng.random() < 0.3,
        prefill_spread=rng.choice([0, 4]),
        by_priority=each.by_priority,
        long_prompt=rng.choice([0, 20]),
    )
    lengths = [rng.choice([1, 2, 7, 30, 100]) for _ in range(rng.choice([0, 1, 3, 40]))]
    prompts = [rng.choice([5] * 9 + [200]) for _ in lengths]
    fleet = Fleet(each, lambda: [*map(make_job, range(len(lengths)), prompts, lengths)], limits).run(rng)
    finished(fleet, len(lengths))


@pytest.mark.parametrize("share", ["dynamic", "static"])
@pytest.mark.parametrize(("dp", "rows"), [(2, 0), (2, 1), (4, 3), (3, 7)])
def test_fewer_rows_than_replicas_or_seats(dp: int, rows: int, share: str) -> None:
    answered = finished(Fleet(Rules(4, dp=dp, share=share), rows_of(*range(1, rows + 1))).run(), rows)
    assert answered == [len(range(replica, rows, dp)) for replica in range(dp)]


def test_rows_that_are_long_in_turn_are_shared_out() -> None:
    """Dealt out in turn, one replica would get all long ones."""
    lengths = [100, 2, 2, 2] * 100
    dynamic, static = (Fleet(Rules(4, dp=4, share=share), rows_of(*lengths)).run() for share in ("dynamic", "static"))
    finished(static, 400)
    finished(dynamic, 400)
    assert max(static.busy) > 2 * max(dynamic.busy)
    assert static.idle_tail > 0.5
    assert dynamic.idle_tail < 0.1


def test_a_replica_that_drains_early_waits_for_the_others() -> None:
    fleet = Fleet(Rules(2, dp=3), rows_of(500, 3, 3)).run(random.Random(0))
    finished(fleet, 3)
    assert max(fleet.busy[1:]) < 10 and fleet.busy[0] >= 500


@pytest.mark.parametrize("share", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("seats", "gate"), [(1, "off"), (1, "saturated"), (1, "interval"), *((2, gate) for gate in GATES)]
)
def test_few_seats_and_one_long_request(seats: int, gate: str, share: str) -> None:
    """The others neither stand still nor wait for its end."""
    fleet = Fleet(Rules(seats, dp=3, gate=gate, share=share, patience=16), rows_of(1000, *[10] * 60))
    held: list[list[int]] = [[], [], []]
    done = 0
    while done < 3:
        for replica in range(3):
            if held[replica][-1:] != [-1] and fleet.board.may_tick(replica):
                over = fleet.tick(replica)
                held[replica].append(-1 if over else fleet.balances[replica].gate.held)
                done += over
    finished(fleet, 61)
    assert max(max(ticks) for ticks in held) <= 16, "nobody is held longer than patience"
    if share == "dynamic":
        assert max(fleet.busy) < 1100
        assert sorted(fleet.busy)[1] < 1000, "the short rows are done before the long one"


def test_a_gate_makes_replicas_prefill_together() -> None:
    def mixed(gate: str) -> float:
        fleet = Fleet(Rules(16, dp=4, gate=gate), lambda: lognormal_jobs(600, sigma=0.5)).run()
        finished(fleet, 600)
        frozen = sum(balance.frozen_ticks for balance in fleet.balances)
        assert (frozen > 0) == (gate != "off")
        assert len({balance.mixed_ticks for balance in fleet.balances}) == 1
        return fleet.balances[0].mixed_ticks

    off = mixed("off")
    assert mixed("saturated") < off / 2
    assert mixed("interval") < off


def test_dynamic_sharing_leaves_a_short_tail() -> None:
    fleet = Fleet(Rules(16, dp=4), lambda: lognormal_jobs(3000)).run()
    finished(fleet, 3000)
    assert fleet.idle_tail <= 0.05


def test_seats_are_refilled_at_once_from_the_reserve() -> None:
    """While there are rows, hardly a seat is empty although loads are late."""
    fleet = Fleet(Rules(16, dp=2, lag=4), lambda: [make_job(index, 5, 40 + index % 17) for index in range(600)]).run()
    finished(fleet, 600)
    running = [each.running for written in fleet.board.written for each in written if not each.flags & EXHAUSTED]
    assert sum(running) > 0.97 * 16 * len(running)


def test_equal_runs_are_equal_in_any_order() -> None:
    def trace(seed: int) -> list[list[Load]]:
        fleet = Fleet(Rules(4, dp=3, gate="saturated", lag=2), lambda: lognormal_jobs(60)).run(random.Random(seed))
        return fleet.board.written

    first = trace(0)
    assert trace(1) == trace(2) == first
    assert len({each for written in first for each in written}) > 100


def test_a_row_counts_as_its_requests_until_loads_show_them() -> None:
    """Else the first replica would be given rows of many choices as long as it has seats."""
    deal = Demand(rules(dp=2, lag=1))
    deal.see(None)
    order = []
    for _ in range(4):
        order.append(deal.next(0))
        deal.took(6)
    assert order[:2] == [True, False], "the other one lacks more now"


def test_a_row_that_is_not_there_yet_is_nobodys() -> None:
    for deal in (Demand(rules(dp=2)), Turns(rules(dp=2))):
        deal.see(None)
        asked = []
        for _ in range(3):
            asked.append(deal.next(0))
            deal.took(0)
        assert asked[1:] == asked[:1] * 2, "it is the same replica's whenever it comes"
