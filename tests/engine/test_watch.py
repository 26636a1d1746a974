"""Several watches as one, called by an engine after every tick."""

from spmd.engine import all_of
from tests.support.simulation import Simulation, make_request, make_scheduler


def test_those_given_are_called_in_order_after_every_tick() -> None:
    seen: list[tuple[str, int]] = []
    simulation = Simulation(make_scheduler()).add([make_request(0)])
    first, second = (
        lambda engine, name=name: seen.append((name, engine.ring[-1].tick)) for name in ("first", "second")
    )
    simulation.engine.watch = all_of(first, all_of(), second)
    simulation.engine.run()
    ticks = range(seen[-1][1] + 1)
    assert len(ticks) > 5 and seen == [(name, tick) for tick in ticks for name in ("first", "second")]
