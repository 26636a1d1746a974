"""Tokens on a GPU are those of transformers on a CPU: by CUDA graphs and without, committed late and at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.gpu_runs import OPTIONS, solve
from tests.support.oracle import Task
from tests.support.ranks import Ranks

Solved = Callable[[str], Task]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_one_stage(ranks: Ranks, task: Solved, tmp_path: Path, enforce_eager: bool, lookahead: int) -> None:
    solve(ranks, task("qwen3"), tmp_path, (1, 1, 1), enforce_eager, lookahead=lookahead)


@pytest.mark.parametrize("options", OPTIONS)
def test_one_stage_with_every_option(ranks: Ranks, task: Solved, tmp_path: Path, options: str) -> None:
    solve(ranks, task("qwen3"), tmp_path, (1, 1, 1), **OPTIONS[options])


@pytest.mark.parametrize("model", ["llama_llama3", "llama_yarn", "mistral", "mixtral"])
def test_families(ranks: Ranks, task: Solved, tmp_path: Path, model: str) -> None:
    experts_by_turns = model == "mixtral"  # in float32; the host must know how many tokens each one gets
    solve(ranks, task(model), tmp_path, (1, 1, 1), enforce_eager=experts_by_turns)
