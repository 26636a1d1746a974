"""How much of the list an engine goes through in a tick: rows that can't be answered, rows that aren't there yet."""

import signal
from collections.abc import Sequence

import pytest

from spmd.api.rows import BadRow, Job
from spmd.api.source import NOT_YET, Listed, NotYet, Skipped
from spmd.bench.balance import make_job
from spmd.bench.simulation import Fleet, Replica
from spmd.parallel.packet import Packet
from spmd.parallel.replicas import Alone
from spmd.schedule.balance import Rules
from tests.support.simulation import Simulation, make_scheduler

SEATS = 16


def bad_rows(count: int) -> list[BadRow]:
    return [BadRow(index, f"row-{index}", "the row is empty") for index in range(count)]


def jobs() -> list[Job]:
    return [make_job(index, 5, 3 + index % 4) for index in range(60)]


class Halting:
    """A source that says NOT_YET each time before it gives a row; with no rows, for ever."""

    waited = 0.0

    def __init__(self, rows: Sequence[Job]) -> None:
        self.listed = Listed(rows) if rows else None
        self.asked = 0

    def next_row(self, own: bool) -> Job | BadRow | Skipped | NotYet | None:
        self.asked += 1
        return self.listed.next_row(own) if self.listed and self.asked % 2 == 0 else NOT_YET


def halting_fleet(share: str, rows: Sequence[Sequence[Job]]) -> Fleet:
    """Two replicas, whose sources have these rows."""
    fleet = Fleet(Rules(SEATS, dp=2, share=share, lag=1), jobs)
    for replica, own in zip(fleet.replicas, rows, strict=True):
        replica.engine.source = Halting(own)
    return fleet


def test_rows_that_cannot_be_answered_count_in_their_tick() -> None:
    simulation = Simulation(make_scheduler(SEATS), Listed(bad_rows(1000)))
    simulation.tick()
    assert simulation.engine.rows == Rules(SEATS).wanted
    simulation.run()
    assert simulation.results.opened == [*range(1000)]


@pytest.mark.parametrize("share", ["static", "dynamic"])
def test_rows_that_cannot_be_answered_count_in_their_tick_among_replicas(share: str) -> None:
    fleet = Fleet(Rules(SEATS, dp=2, share=share), list)
    for rank, replica in enumerate(fleet.replicas):
        replica.engine.source = Listed(bad_rows(1000))
        fleet.tick(rank)
        assert 0 < replica.engine.rows <= 2 * SEATS
    fleet.run()
    assert sorted(row for replica in fleet.replicas for row in replica.results.opened) == [*range(1000)]


def test_a_row_that_is_not_there_yet_ends_the_feeding_of_its_tick() -> None:
    source = Halting(jobs())
    replica = Replica(make_scheduler(SEATS), source, Alone(Rules(SEATS)))
    for asked in (1, 3, 5):
        replica.tick()
        assert (source.asked, replica.engine.rows, replica.engine.passed) == (asked, asked // 2, asked // 2)
    while not replica.engine.replicas.over:
        replica.tick()
    assert replica.results.opened == [*range(60)]


@pytest.mark.parametrize("share", ["static", "dynamic"])
def test_replicas_answer_every_row_once_although_rows_are_late(share: str) -> None:
    fleet = halting_fleet(share, [jobs(), jobs()]).run()
    each = [replica.results.opened for replica in fleet.replicas]
    assert all(each) and sorted(each[0] + each[1]) == [*range(60)]
    assert sum(len(replica.results.finished) for replica in fleet.replicas) == 60


@pytest.mark.parametrize("share", ["static", "dynamic"])
def test_a_stop_is_heeded_while_no_row_comes(share: str) -> None:
    """Rows that were done before are such: there may be billions of them."""
    fleet = halting_fleet(share, [[], []])
    results = fleet.replicas[0].results
    results.receive = lambda plan: Packet([], [], stop=signal.SIGTERM)  # type: ignore[method-assign]
    fleet.run(most=20)
    assert [balance.stopped for balance in fleet.balances] == [signal.SIGTERM] * 2
    assert [replica.engine.rows for replica in fleet.replicas] == [0, 0]
