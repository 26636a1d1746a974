"""Replicas that share experts run in lockstep, with dummy forwards where there is nothing to do; tokens stay right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spmd.config import BalanceConfig
from tests.support.driver import answers, configure, run
from tests.support.oracle import Task
from tests.support.ranks import Ranks

TOPOLOGIES = {"dp2": (2, 1, 1), "dp4": (4, 1, 1), "dp2pp2": (2, 2, 1), "dp2tp2": (2, 1, 2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "lookahead": {"lookahead": 1, "async_depth": 1},
    "chunked": {"max_num_batched_tokens": 8, "prefill": "exclusive"},
    "gated": {"balance": BalanceConfig(gate="saturated", patience=4), "max_num_seqs": 2},
    "static": {"balance": BalanceConfig(share="static"), "num_blocks": 18, "lookahead": 1},
}


def combinations() -> list[tuple[str, str]]:
    """Every option with two replicas, some on the other topologies."""
    return [(t, o) for t in TOPOLOGIES for o in OPTIONS if t == "dp2" or o in ("lookahead", "gated")]


@pytest.mark.parametrize(("topology", "options"), combinations())
def test_shared_experts_change_no_token(
    ranks: Ranks, task: Callable[[str], Task], tmp_path: Path, topology: str, options: str
) -> None:
    moe = task("qwen3_moe")
    config = configure(moe.model, moe.input, str(tmp_path), TOPOLOGIES[topology], ep=True, **OPTIONS[options])
    assert answers(run(ranks, config)) == moe.answers


def test_mixtral(ranks: Ranks, task: Callable[[str], Task], tmp_path: Path) -> None:
    moe = task("mixtral")
    assert answers(run(ranks, configure(moe.model, moe.input, str(tmp_path), (2, 1, 1), ep=True))) == moe.answers


def test_fewer_rows_than_replicas(ranks: Ranks, task: Callable[[str], Task], tmp_path: Path) -> None:
    moe = task("qwen3_moe")
    file = tmp_path / "one.jsonl"
    file.write_text(Path(moe.input).read_text().splitlines()[0] + "\n")
    (found,) = answers(run(ranks, configure(moe.model, str(file), str(tmp_path), (4, 1, 1), ep=True))).items()
    assert found in moe.answers.items()
