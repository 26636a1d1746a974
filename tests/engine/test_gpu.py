"""Tokens on a GPU are those of transformers on a CPU: by CUDA graphs and without, committed late and at once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.broken_model import break_model
from tests.support.driver import answers, configure, errors, run
from tests.support.gpu_runs import OPTIONS, solve
from tests.support.oracle import Task, make_row
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


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_rows_without_numbers_change_no_other(ranks: Ranks, tmp_path: Path, enforce_eager: bool) -> None:
    model = break_model(tmp_path / "model", "Qwen3ForCausalLM", float("nan"))
    rows = [make_row(f"good-{i}", prompt, len(model.outputs[i])) for i, prompt in enumerate(model.prompts)]
    rows += [make_row(f"bad-{i}", [*prompt, model.bad], 9, logprobs=1) for i, prompt in enumerate(model.prompts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::2] + rows[1::2]))
    config = configure(model.path, f"{tmp_path}/rows.jsonl", str(tmp_path), (1, 1, 1), lookahead=1)
    chosen = replace(config.model, attention_backend="torch", enforce_eager=enforce_eager)
    reports = run(ranks, replace(config, device="cuda", model=chosen))
    found = {name: answer[0][0] for name, answer in answers(reports).items()}
    assert found == {f"good-{i}": output for i, output in enumerate(model.outputs)}
    assert errors(reports).keys() == {f"bad-{i}" for i in range(len(model.prompts))}
