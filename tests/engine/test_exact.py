"""Tokens do not depend on topology, batching, caching or timing: each is that of transformers, or of its logits."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.driver import Report, answers, configure, run
from tests.support.oracle import MODELS, Task
from tests.support.ranks import Ranks

Solved = Callable[[str], Task]

TOPOLOGIES = {  # dp, pp, tp
    "single": (1, 1, 1),
    "pp2": (1, 2, 1),
    "pp3": (1, 3, 1),
    "pp4": (1, 4, 1),
    "tp2": (1, 1, 2),
    "dp2": (2, 1, 1),
    "pp2tp2": (1, 2, 2),
    "dp2pp2": (2, 2, 1),
}
TINY_POOL = 18  # blocks: 17 for requests, of which the longest takes 14
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "depth1": {"async_depth": 1},
    "depth2": {"async_depth": 2},
    "exclusive": {"prefill": "exclusive"},
    "exclusive_batch": {"prefill": "exclusive", "prefill_batch": 3, "async_depth": 1},
    "chunked": {"max_num_batched_tokens": 8},
    "chunked_exclusive": {"max_num_batched_tokens": 8, "prefill": "exclusive", "async_depth": 1},
    "uncached": {"prefix_caching": False},
    "preempting": {"num_blocks": TINY_POOL},
    "preempting_deep": {"num_blocks": TINY_POOL, "async_depth": 2, "max_num_batched_tokens": 8},
    "preempting_uncached": {"num_blocks": TINY_POOL, "prefix_caching": False, "prefill": "exclusive"},
    "uncapped": {"decode_cap": False},
    "buckets": {"decode_buckets": [1], "max_num_seqs": 12},
    "mixed_buckets": {"mixed_buckets": [4, 16, 64], "max_num_batched_tokens": 64, "lookahead": 1},
    "priority": {"policy": "priority", "async_depth": 1},
    "spread": {"prefill_spread": 3},
    "blocks_of_one": {"block_size": 1},
    "lookahead": {"lookahead": 1},
    "lookahead2": {"lookahead": 2},
    "lookahead_deep": {"lookahead": 1, "async_depth": 1},
    "lookahead_exclusive": {"lookahead": 1, "prefill": "exclusive", "max_num_batched_tokens": 8},
    "lookahead_preempting": {"lookahead": 1, "num_blocks": TINY_POOL},
    "lookahead_uncached": {"lookahead": 2, "num_blocks": TINY_POOL, "prefix_caching": False, "async_depth": 1},
    "lookahead_priority": {"lookahead": 1, "policy": "priority", "decode_buckets": [1]},
}


def solve(ranks: Ranks, task: Task, tmp_path: Path, topology: str, options: dict[str, Any]) -> list[Report]:
    config = configure(task.model, task.input, str(tmp_path), TOPOLOGIES[topology], **options)
    reports = run(ranks, config)
    found = answers(reports)
    assert found.keys() == task.answers.keys()
    wrong = {key: (found[key], answer) for key, answer in task.answers.items() if found[key] != answer}
    assert not wrong
    return reports


@pytest.mark.parametrize("topology", ["single", "pp2", "tp2"])
@pytest.mark.parametrize("model", MODELS)
def test_every_family_answers_as_transformers(
    ranks: Ranks, task: Solved, tmp_path: Path, model: str, topology: str
) -> None:
    solve(ranks, task(model), tmp_path, topology, {})


def combinations() -> list[Any]:
    """Every option on every topology; a plain run leaves out those that others stand for."""
    everywhere = ("default", "depth2", "chunked", "preempting")
    widely = ("exclusive_batch", "lookahead", "lookahead_deep", "lookahead_preempting")

    def tells(option: str, topology: str) -> bool:
        return topology in ("single", "pp2") or option in everywhere or (option in widely and topology == "pp2tp2")

    return [
        pytest.param(option, topology, marks=[] if tells(option, topology) else [pytest.mark.full])
        for option in OPTIONS
        for topology in TOPOLOGIES
    ]


@pytest.mark.parametrize(("options", "topology"), combinations())
def test_every_option_on_every_topology(
    ranks: Ranks, task: Solved, tmp_path: Path, options: str, topology: str
) -> None:
    model = "qwen3_7" if topology == "pp3" else "qwen3"
    reports = solve(ranks, task(model), tmp_path, topology, OPTIONS[options])
    chosen, leaders = OPTIONS[options], [report for report in reports if report.answers]
    assert all(report.preemptions > 0 for report in leaders) == ("num_blocks" in chosen)
    assert all(report.cached_tokens > 0 for report in leaders) == chosen.get("prefix_caching", True)


def mixtures(number: int, seed: int = 0) -> list[Any]:
    """Random models, topologies and values of all options at once; the first few are enough for a plain run."""
    rng = random.Random(seed)
    mixed = [
        (
            rng.choice([*MODELS]),
            rng.choice([name for name in TOPOLOGIES if name != "single"]),
            {
                "async_depth": rng.randrange(3),
                "lookahead": rng.randrange(3),
                "prefill": rng.choice(["mixed", "exclusive"]),
                "prefill_batch": rng.randint(1, 3),
                "prefill_spread": rng.choice([0, 2]),
                "max_num_seqs": rng.randint(4, 12),
                "max_num_batched_tokens": rng.choice([12, 19, 64]),
                "block_size": rng.choice([2, 4, 8]),
                "num_blocks": rng.choice([None, 40]),
                "prefix_caching": rng.random() < 0.6,
                "decode_cap": rng.random() < 0.8,
                "decode_buckets": rng.choice([[], [1]]),
                "policy": rng.choice(["fcfs", "priority"]),
            },
        )
        for _ in range(number)
    ]
    return [
        pytest.param(*mixture, marks=[pytest.mark.full] if index >= 8 else []) for index, mixture in enumerate(mixed)
    ]


@pytest.mark.parametrize(("model", "topology", "options"), mixtures(100))
def test_random_mixtures_change_no_token(
    ranks: Ranks, task: Solved, tmp_path: Path, model: str, topology: str, options: dict[str, Any]
) -> None:
    solve(ranks, task(model), tmp_path, topology, options)
