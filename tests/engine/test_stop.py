"""A signal on any rank: all ranks stop at the same tick, and what was answered until then is right."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from spmd.config import Config, GuardConfig
from spmd.engine import Engine
from spmd.signals import listening, name
from tests.support.driver import Report, answers, configure, drive, run
from tests.support.oracle import Task
from tests.support.ranks import Ranks

SLOW_MS = 8.0  # the pause after a tick is drawn up to here, so that a signal comes through before the end


def drive_and_stop(rank: int, config: Config, culprit: int, tick: int) -> Report:
    """What this rank saw; `culprit` gets a SIGTERM before its tick of that number."""
    ticked, t = Engine.tick, config.topology

    def kill(self: Engine, now: int) -> None:
        if rank == culprit and now == tick:
            os.kill(os.getpid(), signal.SIGTERM)
        ticked(self, now)

    with patch.object(Engine, "tick", kill), listening(rank) as stop:
        return drive(rank, config, [SLOW_MS] * (t.dp * t.pp * t.tp), stop)


@pytest.mark.parametrize(
    ("topology", "culprit", "options"),
    [
        ((1, 1, 1), 0, {}),
        ((1, 2, 1), 0, {}),
        ((1, 2, 1), 1, {"lookahead": 2, "async_depth": 1}),
        ((1, 2, 2), 1, {"lookahead": 1}),
        ((2, 1, 1), 1, {}),
        ((2, 2, 1), 2, {"lookahead": 1}),
    ],
)
def test_all_ranks_stop_at_the_same_tick(
    ranks: Ranks,
    task: Callable[[str], Task],
    tmp_path: Path,
    topology: tuple[int, int, int],
    culprit: int,
    options: dict[str, Any],
) -> None:
    solved = task("qwen3")
    config = configure(solved.model, solved.input, str(tmp_path), topology, max_num_seqs=2, **options)
    config = replace(config, guard=GuardConfig(enabled=False, timeout=2.0))
    reports = run(ranks, config, drive_and_stop, culprit, 5)
    assert {name(report.stopped) for report in reports} == {f"SIGTERM on rank {culprit}"}
    got = answers(reports)
    assert len(got) < len(solved.answers), "it ran to its end"
    assert got.items() <= solved.answers.items()
