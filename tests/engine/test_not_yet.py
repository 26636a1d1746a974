"""A source that has nothing yet: the engine goes on with what it has, and asks for the same row in its next tick."""

import random

import pytest

from spmd.api.rows import BadRow, Job
from spmd.api.source import NOT_YET, Listed, NotYet, Skipped
from spmd.bench.balance import make_job
from spmd.bench.simulation import Fleet
from spmd.replicas import Alone
from spmd.schedule.balance import Rules
from tests.support.simulation import Simulation, make_scheduler

LENGTHS = [30, 1, 5, 60, 2, 9, 1, 40, 3, 3, 8, 20, 1, 1, 50, 7]
WITHHELD = {0: 3, 1: 0, 5: 9, 6: 1, 12: 40}  # rows, and for how many ticks


class Arriving:
    """Rows of which some come late; everybody is told so at the same ticks."""

    def __init__(self, jobs: list[Job]) -> None:
        self.rows = Listed(jobs)
        self.given = 0
        self.left = dict(WITHHELD)
        self.refused: list[int] = []  # rows that were asked for in vain

    def next_row(self, own: bool) -> Job | BadRow | Skipped | NotYet | None:
        if self.left.get(self.given, 0):
            self.left[self.given] -= 1
            self.refused.append(self.given)
            return NOT_YET
        self.given += 1
        return self.rows.next_row(own)


def jobs() -> list[Job]:
    return [make_job(index, 5, length) for index, length in enumerate(LENGTHS)]


def in_vain() -> list[int]:
    return [row for row, ticks in WITHHELD.items() for _ in range(ticks)]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_one_replica_asks_once_a_tick_and_answers_all(lookahead: int) -> None:
    source = Arriving(jobs())
    simulation = Simulation(make_scheduler(4, 2, lookahead=lookahead), source, Alone(Rules(4)))
    asked: list[int] = []  # refusals so far, tick by tick
    while not simulation.engine.replicas.over:
        simulation.tick()
        asked.append(len(source.refused))
    simulation.engine.drain()
    assert sorted(request.index for request in simulation.finished) == [*range(len(LENGTHS))]
    assert simulation.results.opened == [*range(len(LENGTHS))]
    assert source.refused == in_vain()
    assert all(later - sooner <= 1 for sooner, later in zip([0, *asked], asked, strict=False))
    assert any(not plan.requests for plan in simulation.plans[:3]), "it ticks on with nothing to do"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("share", ["dynamic", "static"])
def test_replicas_are_refused_at_the_same_ticks_and_share_the_rows(share: str, seed: int) -> None:
    rng = random.Random(seed)
    sources: list[Arriving] = []

    def arriving(each: list[Job]) -> Arriving:
        sources.append(Arriving(each))
        return sources[-1]

    fleet = Fleet(Rules(2, dp=3, share=share, lag=rng.randrange(4)), jobs, source=arriving)
    refused: list[list[int]] = [[], [], []]  # ticks of each replica
    working = [0, 1, 2]
    while working:
        replica = rng.choice([each for each in working if fleet.board.may_tick(each)])
        tick, before = fleet.ticks[replica], len(sources[replica].refused)
        if fleet.tick(replica):
            working.remove(replica)
        if len(sources[replica].refused) > before:
            refused[replica].append(tick)
    assert [source.refused for source in sources] == [in_vain()] * 3
    assert len(set(fleet.ticks)) == 1
    if share == "dynamic":
        assert refused[0] == refused[1] == refused[2]
    opened = [replica.results.opened for replica in fleet.replicas]
    assert sorted(row for rows in opened for row in rows) == [*range(len(LENGTHS))]
    if share == "static":
        assert opened == [[*range(replica, len(LENGTHS), 3)] for replica in range(3)], "a row keeps its turn"


def test_what_was_refused_is_allotted_anew() -> None:
    """A replica that got no row is as much in need of one as before."""
    fleet = Fleet(Rules(2, dp=3, lag=0), jobs, source=Arriving)
    for replica in range(3):
        fleet.tick(replica)
    assert [balance.deal.allotted for balance in fleet.balances] == [[0, 0, 0]] * 3
    for _ in range(3):
        for replica in range(3):
            fleet.tick(replica)
    assert [balance.deal.allotted for balance in fleet.balances] == [[2, 2, 1]] * 3, "row 5 comes later"
