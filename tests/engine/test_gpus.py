"""Tokens on two GPUs, as stages or as tensor ranks, are those of transformers on a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.gpu_runs import OPTIONS, solve
from tests.support.oracle import Task
from tests.support.ranks import Ranks

Solved = Callable[[str], Task]
TOPOLOGIES = {"pp2": (1, 2, 1), "tp2": (1, 1, 2)}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("enforce_eager", [False, True])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_two_ranks(
    ranks: Ranks, task: Solved, tmp_path: Path, topology: str, enforce_eager: bool, lookahead: int
) -> None:
    solve(ranks, task("qwen3"), tmp_path, TOPOLOGIES[topology], enforce_eager, lookahead=lookahead)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_two_ranks_with_every_option(ranks: Ranks, task: Solved, tmp_path: Path, topology: str, options: str) -> None:
    solve(ranks, task("qwen3"), tmp_path, TOPOLOGIES[topology], **OPTIONS[options])
