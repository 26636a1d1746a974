"""Phases of start-up."""

from time import perf_counter

import pytest

from spmd.report.startup import Phases


def test_phases_follow_one_another_and_fill_the_whole_time() -> None:
    began = perf_counter()
    phases = Phases(began)
    assert phases.total == 0
    for name in ("imports", "weights", "cache", "warm-up", "cache"):
        phases.end(name)
    assert list(phases.seconds) == ["imports", "weights", "cache", "warm-up"]
    assert all(seconds > 0 for seconds in phases.seconds.values())
    assert phases.total == pytest.approx(phases.since - began)
    assert str(Phases(0.0, {"imports": 1.234, "weights": 20.0})) == "imports 1.23 s, weights 20.00 s"
