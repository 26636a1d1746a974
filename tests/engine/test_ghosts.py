"""Commits that lag behind the ring, with the real engine; each test also checks every answer and every plan."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pytest

from spmd.config import Config
from spmd.stage.stage import Stage
from tests.support.driver import Report, answers, configure, drive, run
from tests.support.oracle import LONGEST, Task
from tests.support.ranks import Ranks

TOPOLOGIES = {"single": (1, 1, 1), "pp2": (1, 2, 1), "tp2": (1, 1, 2), "pp2tp2": (1, 2, 2)}


@pytest.fixture
def qwen3(task: Callable[[str], Task]) -> Task:
    return task("qwen3")


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
@pytest.mark.parametrize("pp", [1, 2])
def test_only_stops_cost_rows_and_few(ranks: Ranks, qwen3: Task, tmp_path: Path, pp: int, lookahead: int) -> None:
    reports = run(ranks, configure(qwen3.model, qwen3.input, str(tmp_path), (1, pp, 1), lookahead=lookahead))
    found = answers(reports)
    assert found == qwen3.answers
    choices = [choice for answer in found.values() for choice in answer]
    committed = sum(len(token_ids) for token_ids, _, _ in choices)
    stopped = sum(reason == "stop" for _, reason, _ in choices)
    wasted = sum(len(tick.sampled) for tick in reports[0].ticks) - committed
    assert bool(lookahead) <= wasted <= stopped * -(-lookahead // pp)


@pytest.mark.parametrize("lookahead", [1, 3])
def test_one_stage_samples_a_row_at_every_tick(
    ranks: Ranks, task: Callable[[str], Task], tmp_path: Path, lookahead: int
) -> None:
    solved = task("qwen3_7")  # whose first answer isn't cut short
    first = Path(solved.input).read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(first + "\n")
    config = configure(solved.model, f"{tmp_path}/one.jsonl", str(tmp_path), (1, 1, 1), lookahead=lookahead)
    (report,) = run(ranks, config)
    assert report.answers == {"greedy-0": solved.answers["greedy-0"]}
    busy = [number for number, tick in enumerate(report.ticks) if tick.sampled]
    assert len(busy) == LONGEST and all(later - sooner == 1 for sooner, later in pairwise(busy))


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("async_depth", [0, 1])
def test_seats_change_hands_before_tokens_come_back(
    ranks: Ranks, qwen3: Task, tmp_path: Path, async_depth: int, lookahead: int
) -> None:
    sizes: dict[str, Any] = {"max_num_seqs": 2, "async_depth": async_depth, "lookahead": lookahead}
    assert answers(run(ranks, configure(qwen3.model, qwen3.input, str(tmp_path), (1, 2, 1), **sizes))) == qwen3.answers


@pytest.mark.parametrize(
    "delays_ms",
    [
        *((5.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 5.0), (3.0, 3.0, 3.0, 3.0)),
        *(pytest.param(late, marks=pytest.mark.full) for late in ((0.0, 5.0, 0.0, 0.0), (0.0, 0.0, 5.0, 0.0))),
    ],
)
def test_equal_plans_whoever_is_late(ranks: Ranks, qwen3: Task, tmp_path: Path, delays_ms: tuple[float, ...]) -> None:
    config = configure(qwen3.model, qwen3.input, str(tmp_path), (1, 2, 2), lookahead=1, num_blocks=20)
    reports = run(ranks, config, drive, delays_ms)
    assert answers(reports) == qwen3.answers
    assert len({tuple(tick.digests for tick in report.ticks) for report in reports}) == 1


def drive_lagging(rank: int, config: Config, lag: int) -> Report:
    """Leave samples where they are for `lag` ticks, as on a GPU."""
    with patch.object(Stage, "result_lag", PropertyMock(return_value=lag)):
        return drive(rank, config)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("lag", [1, 9])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_leader_may_hold_packets_back_until_they_are_received(
    ranks: Ranks, qwen3: Task, tmp_path: Path, topology: str, lag: int, lookahead: int
) -> None:
    config = configure(qwen3.model, qwen3.input, str(tmp_path), TOPOLOGIES[topology], lookahead=lookahead)
    assert answers(run(ranks, config, drive_lagging, lag)) == qwen3.answers
