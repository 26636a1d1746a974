"""Accounts of a rank's time: what belongs where, and that nothing is left over or counted twice."""

import random
import time

import pytest

from spmd.trace.account import BUSY, PARTS, Ledger
from spmd.trace.host_clock import COUNTERS, HostClock
from spmd.trace.phases import NUM_PHASES, Phase


def test_every_phase_belongs_to_one_part_but_the_forward_which_is_shared_out() -> None:
    phases = [phase for part in PARTS.values() for phase in part]
    assert sorted(phases) == sorted(set(Phase) - {Phase.FORWARD})
    assert [part for part, phases in PARTS.items() if not phases] == ["forward", "padding", "dummy", "idle_tail"]


def test_a_forward_is_useful_padding_or_a_dummy() -> None:
    ledger = Ledger()
    ledger.forward(800, rows=8, useful=6)
    ledger.forward(100, rows=8, useful=8)
    ledger.forward(50, rows=8, useful=0)
    ledger.settle()
    seconds = ledger.account(1e-6).seconds
    expected = {"forward": 700e-9, "padding": 200e-9, "dummy": 50e-9, "idle_tail": 50e-9}
    assert {part: value for part, value in seconds.items() if value} == pytest.approx(expected)


def test_what_comes_after_the_last_token_is_tail_but_for_forwards() -> None:
    ledger = Ledger()
    ledger.ns = [100] * NUM_PHASES
    ledger.settle()
    for phase in Phase:
        ledger.ns[phase] += 7
    ledger.forward(13, rows=4, useful=0)
    account = ledger.account(1e-5)
    assert account.wall == pytest.approx(1e-5)
    assert account.busy == pytest.approx((2 * 107 + 13) / 1e9)
    waits_and_host = sum(account.seconds[part] for part in PARTS if part not in (*BUSY, "idle_tail"))
    assert waits_and_host == pytest.approx(100e-9 * (NUM_PHASES - 2))


def test_a_replica_that_never_had_a_row_is_idle_all_the_time() -> None:
    ledger = Ledger()
    ledger.ns[Phase.EXCHANGE] = 10**9
    assert ledger.account(3.0).percent()["idle_tail"] == pytest.approx(100)


def test_phases_follow_one_another_without_a_gap() -> None:
    clock, rng, waited, started = HostClock(), random.Random(0), [0.0] * 3, time.perf_counter_ns()
    clock.start()
    for _ in range(300):
        phase = rng.choice([phase for phase in Phase if phase + 1 not in COUNTERS])
        if phase is Phase.FORWARD:
            clock.ran(8, rng.randrange(9))
        elif phase in COUNTERS and rng.random() < 0.7:
            began = time.perf_counter()
            time.sleep(rng.random() / 1e4)
            waited[COUNTERS[phase]] += time.perf_counter() - began
            clock.end(phase, waited[COUNTERS[phase]])
        else:
            clock.end(phase)
    clock.settle()
    clock.stop()
    spent = time.perf_counter_ns() - started
    assert 0.95 * spent < sum(clock.ledger.ns) <= spent
    assert clock.ledger.ns[Phase.PACKET] + clock.ledger.ns[Phase.SAMPLES] == pytest.approx(1e9 * waited[0], rel=1e-3)
    assert clock.ledger.ns[Phase.ROWS] == pytest.approx(1e9 * waited[2], rel=1e-3)
    assert clock.account(spent / 1e9).wall == pytest.approx(spent / 1e9)


def test_a_wait_is_never_longer_than_its_phase() -> None:
    """A counter may have begun before the run did."""
    clock = HostClock()
    clock.end(Phase.FEED, waited=1000.0)
    assert 0 < clock.ledger.ns[Phase.ROWS] < 1e9 and clock.ledger.ns[Phase.FEED] == 0
