"""Rows whose logits are no numbers end with an error that says so, and change no other row, wherever they leave NaN."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from spmd.config import Config
from tests.support.broken_model import BrokenModel, break_model
from tests.support.driver import answers, configure, errors, run
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
    for name, message in found.items():
        token = broken.spoilt_at + 1 if name.startswith("later") else 1
        assert f"no numbers (NaN or infinity) at token {token}" in message
    assert max(len(report.ticks) for report in reports) < 80


MODELS: dict[str, tuple[str, float, int | None, dict[str, Any]]] = {  # family, value, broken token, keys of the config
    "dense": ("Qwen3ForCausalLM", float("nan"), None, {}),
    "infinite": ("LlamaForCausalLM", float("inf"), None, {}),
    "window": ("MistralForCausalLM", float("nan"), None, {"sliding_window": 7}),
    "experts": ("Qwen3MoeForCausalLM", float("nan"), None, {}),
    "padding": ("Qwen3MoeForCausalLM", float("nan"), 0, {}),  # the token that padding rows hold
}
Breaks = Callable[[str], BrokenModel]


@pytest.fixture(scope="module")
def breaks(tmp_path_factory: pytest.TempPathFactory) -> Breaks:
    folder = tmp_path_factory.mktemp("broken")

    def make(name: str) -> BrokenModel:
        family, value, bad, keys = MODELS[name]
        return break_model(folder / name, family, value, bad, **keys)

    return cache(make)


def mixed_rows(model: BrokenModel) -> tuple[list[dict[str, Any]], dict[str, list[int]]]:
    """Rows with and without numbers in turn, many with a prefix in common, and the outputs of the good ones."""
    rows, outputs = [], {}
    for turn in range(3):
        for place, (prompt, output) in enumerate(zip(model.prompts, model.outputs, strict=True)):
            rows.append(make_row(f"bad-{turn}-{place}", [*prompt, model.bad, *prompt[:turn]], 20))
            rows.append(make_row(f"good-{turn}-{place}", prompt, len(output) - turn))
            outputs[f"good-{turn}-{place}"] = output[: len(output) - turn]
    return rows, outputs


def check_answers(ranks: Ranks, model: BrokenModel, folder: Path, topology: str, options: dict[str, Any]) -> None:
    rows, outputs = mixed_rows(model)
    reports = run(ranks, configured(model, rows, folder, topology, **options))
    assert {name: answer[0][0] for name, answer in answers(reports).items()} == outputs
    assert errors(reports).keys() == {row["custom_id"] for row in rows} - outputs.keys()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("name", MODELS)
def test_other_rows_answer_as_without_it(
    ranks: Ranks, breaks: Breaks, tmp_path: Path, name: str, topology: str, caching: bool
) -> None:
    check_answers(ranks, breaks(name), tmp_path, topology, {"prefix_caching": caching})


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 1, "block_size": 16, "num_blocks": 6},
        {"lookahead": 1},
        {"lookahead": 2, "async_depth": 1, "num_blocks": 18},
        {"max_num_batched_tokens": 8},
        {"prefill": "exclusive", "prefill_batch": 3, "block_size": 16},
        {"decode_buckets": [8], "num_blocks": 18},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["dense", "padding"])
def test_other_rows_answer_as_without_it_however_rows_are_planned(
    ranks: Ranks, breaks: Breaks, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    check_answers(ranks, breaks(name), tmp_path, "single", options)


@pytest.mark.parametrize("caching", [True, False])
def test_the_next_row_in_its_blocks_answers_as_alone(
    ranks: Ranks, breaks: Breaks, tmp_path: Path, caching: bool
) -> None:
    model = breaks("dense")
    rows = [make_row("bad", [*model.prompts[3], model.bad], 9), make_row("good", model.prompts[2], 24)]
    options: dict[str, Any] = {"max_num_seqs": 1, "block_size": 64, "num_blocks": 2, "prefix_caching": caching}
    reports = run(ranks, configured(model, rows, tmp_path, "single", **options))
    assert answers(reports)["good"][0][0] == model.outputs[2]
    assert list(errors(reports)) == ["bad"]


def test_replicas_that_share_experts_answer_as_without_it(ranks: Ranks, breaks: Breaks, tmp_path: Path) -> None:
    for name in ("experts", "padding"):
        check_answers(ranks, breaks(name), tmp_path, "dp2", {"ep": True})
