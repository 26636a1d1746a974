"""Rows whose logits are no numbers: each ends at once with an error that says so, whatever it asked for."""

import json
from pathlib import Path
from typing import Any

import pytest

from spmd.config import Config
from tests.support.broken_model import BrokenModel, break_model
from tests.support.driver import configure, errors, run
from tests.support.oracle import make_row
from tests.support.ranks import Ranks

TOPOLOGIES = {"single": (1, 1, 1), "pp2": (1, 2, 1), "tp2": (1, 1, 2), "pp2tp2": (1, 2, 2), "dp2": (2, 1, 1)}
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 2},
    "sampled": {"temperature": 1.0, "seed": 1},
    "sampled_cut": {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "logprobs": 1},
    "penalised": {"frequency_penalty": 1.0, "repetition_penalty": 1.2},
    "held_open": {"min_tokens": 5, "stop_token_ids": [3]},
    "stopped": {"stop": ["x"]},
    "choices": {"temperature": 1.0, "n": 3},
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> BrokenModel:
    return break_model(tmp_path_factory.mktemp("nan"), "Qwen3ForCausalLM", float("nan"))


def configured(model: BrokenModel, rows: list[dict[str, Any]], folder: Path, topology: str, **options: Any) -> Config:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return configure(model.path, f"{folder}/rows.jsonl", str(folder), TOPOLOGIES[topology], **options)


@pytest.mark.parametrize("options", [{}, {"lookahead": 2}, {"async_depth": 1, "num_blocks": 18}], ids=str)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_row_ends_with_an_error_and_all_ranks_agree(
    ranks: Ranks, broken: BrokenModel, tmp_path: Path, topology: str, options: dict[str, Any]
) -> None:
    prompt = [*broken.prompts[1], broken.bad, *broken.prompts[2]]
    rows = [make_row(name, prompt, 20, **keys) for name, keys in ASKED.items()]
    rows += [make_row("later", broken.spoilt, 20), make_row("later_logprobs", broken.spoilt, 20, logprobs=1)]
    reports = run(ranks, configured(broken, rows, tmp_path, topology, **options))
    found = errors(reports)
    assert found.keys() == {row["custom_id"] for row in rows}
    assert sum(report.failed for report in reports) == len(rows)
    assert all("no numbers (NaN or infinity) at token" in message for message in found.values())
    assert max(len(report.ticks) for report in reports) < 80
