"""Pipelines with uneven seats, layers, prompts, memory or pace; each run also checks every answer and every plan."""

import json
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from spmd.config import Config, ModelConfig, TopologyConfig
from spmd.parallel.hidden import HiddenChannel
from spmd.topology import split_layers
from spmd.worker import settle
from tests.support.driver import Report, Tick, answers, configure, drive, run
from tests.support.oracle import Task
from tests.support.ranks import Ranks

BYTES_PER_LAYER = 2 * 4 * 2 * 16 * 4  # of a block: keys and values, tokens, kv heads, head_dim, float32


@pytest.fixture
def qwen3(task: Callable[[str], Task]) -> Task:
    return task("qwen3_7")


def longest_wait(ticks: list[Tick]) -> int:
    """Most ticks between two tokens of a row."""
    at: dict[int, list[int]] = {}
    for number, tick in enumerate(ticks):
        for row in tick.sampled:
            at.setdefault(row, []).append(number)
    return max(later - sooner for numbers in at.values() for sooner, later in pairwise(numbers))


@pytest.mark.parametrize(("seats", "pp"), [(17, 2), (10, 4)])
def test_seats_that_no_stage_divides_all_progress(
    ranks: Ranks, qwen3: Task, tmp_path: Path, seats: int, pp: int
) -> None:
    reports = run(ranks, configure(qwen3.model, qwen3.input, str(tmp_path), (1, pp, 1), max_num_seqs=seats))
    assert answers(reports) == qwen3.answers
    assert max(tick.num_decodes for tick in reports[0].ticks) == seats // pp
    assert longest_wait(reports[0].ticks) <= pp + ceil(seats / (seats // pp))


@pytest.mark.parametrize("async_depth", [0, 2])
def test_one_request_in_a_deep_ring(ranks: Ranks, qwen3: Task, tmp_path: Path, async_depth: int) -> None:
    first = Path(qwen3.input).read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(first + "\n")
    config = configure(qwen3.model, f"{tmp_path}/one.jsonl", str(tmp_path), (1, 4, 1), async_depth=async_depth)
    reports = run(ranks, config)
    assert answers(reports) == {"greedy-0": qwen3.answers["greedy-0"]}
    assert sum(not tick.num_decodes and not tick.chunks for tick in reports[0].ticks) > len(reports[0].ticks) / 2


@pytest.mark.parametrize("prefill", ["mixed", "exclusive"])
def test_all_stages_agree_on_the_phase(ranks: Ranks, qwen3: Task, tmp_path: Path, prefill: str) -> None:
    """Prompts of k and k + 1 tokens, of one, and known ones; middle chunks give no token and use no randomness."""
    config = configure(
        qwen3.model, qwen3.input, str(tmp_path), (1, 3, 1), prefill=prefill, max_num_batched_tokens=8, async_depth=1
    )
    reports = run(ranks, config)
    assert answers(reports) == qwen3.answers
    lengths = [len(json.loads(line)["prompt"]) for line in Path(qwen3.input).read_text().splitlines()]
    assert {1, 8, 9, 16} <= set(lengths)
    for tick in reports[0].ticks:
        done = [row for row, start, count in tick.chunks if start + count == lengths[row]]
        assert tick.sampled[tick.num_decodes :] == done
    chunks = [chunk for tick in reports[0].ticks for chunk in tick.chunks]
    assert any(start + count < lengths[row] for row, start, count in chunks), "no middle chunk"
    assert any(start > 0 and count == 1 for _, start, count in chunks), "no prompt known but for its last token"


@pytest.mark.parametrize("async_depth", [0, 2])
def test_no_ghost_tokens_with_preemption(ranks: Ranks, qwen3: Task, tmp_path: Path, async_depth: int) -> None:
    config = configure(
        qwen3.model, qwen3.input, str(tmp_path), (1, 2, 1), num_blocks=16, max_num_seqs=12, async_depth=async_depth
    )
    reports = run(ranks, config)
    found = answers(reports)
    assert found == qwen3.answers
    assert reports[0].preemptions > 0
    committed = sum(len(token_ids) for answer in found.values() for token_ids, _, _ in answer)
    assert sum(len(tick.sampled) for tick in reports[0].ticks) == committed


@pytest.mark.parametrize("layers", [None, [1, 5, 1], [5, 1, 1]])
def test_uneven_stages_and_tied_embeddings(ranks: Ranks, qwen3: Task, tmp_path: Path, layers: list[int] | None) -> None:
    with safe_open(f"{qwen3.model}/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in list(file.keys())
    reports = run(ranks, configure(qwen3.model, qwen3.input, str(tmp_path), (1, 3, 1), layers))
    assert answers(reports) == qwen3.answers


@pytest.mark.parametrize(
    ("pp", "layers", "message"),
    [
        (8, None, "topology.pp=8 needs at least 8 layers, the model has 7"),
        (2, [3, 3], "has 2 stages and 6 layers; it must list 2 counts"),
        (2, [3, 3, 1], "has 3 stages and 7 layers; it must list 2 counts"),
    ],
)
def test_a_wrong_split_ends_the_start(qwen3: Task, pp: int, layers: list[int] | None, message: str) -> None:
    config = Config(model=ModelConfig(path=qwen3.model), topology=TopologyConfig(pp=pp, layers=layers))
    with pytest.raises(ValueError, match=message):
        settle(config)


def drive_poisoned(rank: int, config: Config) -> Report:
    """Fill every sent buffer with NaN once it has left."""
    send = HiddenChannel.send

    def poisoning(self: HiddenChannel, hidden: Tensor) -> None:
        send(self, hidden)
        self.drain()
        with torch.inference_mode():
            hidden.fill_(float("nan"))

    with patch.object(HiddenChannel, "send", poisoning):
        return drive(rank, config)


def test_nobody_reads_a_buffer_that_was_sent(ranks: Ranks, qwen3: Task, tmp_path: Path) -> None:
    config = configure(qwen3.model, qwen3.input, str(tmp_path), (1, 3, 1), max_num_batched_tokens=8)
    assert answers(run(ranks, config, drive_poisoned)) == qwen3.answers


@pytest.mark.parametrize("async_depth", [0, 1, 2])
def test_seats_change_hands_before_packets_land(ranks: Ranks, qwen3: Task, tmp_path: Path, async_depth: int) -> None:
    config = configure(qwen3.model, qwen3.input, str(tmp_path), (1, 2, 1), max_num_seqs=2, async_depth=async_depth)
    reports = run(ranks, config)
    assert answers(reports) == qwen3.answers
    assert max(tick.num_decodes for tick in reports[0].ticks) == 1


@pytest.mark.parametrize(
    "delays_ms",
    [
        *((5.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 5.0), (3.0, 3.0, 3.0, 3.0)),
        *(pytest.param(late, marks=pytest.mark.full) for late in ((0.0, 5.0, 0.0, 0.0), (0.0, 0.0, 5.0, 0.0))),
    ],
)
def test_equal_plans_whoever_is_late(
    ranks: Ranks, task: Callable[[str], Task], tmp_path: Path, delays_ms: tuple[float, ...]
) -> None:
    solved = task("qwen3")
    config = configure(solved.model, solved.input, str(tmp_path), (1, 2, 2), async_depth=1, num_blocks=20)
    reports = run(ranks, config, drive, delays_ms)
    assert answers(reports) == solved.answers
    assert len({tuple(tick.digests for tick in report.ticks) for report in reports}) == 1


def drive_poor(rank: int, config: Config, rooms: list[int]) -> Report:
    """A rank whose memory is `rooms[rank]` bytes."""
    with patch("spmd.stage.memory.CPU_CACHE_BYTES", rooms[rank]):
        return drive(rank, config)


@pytest.mark.parametrize("poor", [0, 1, 2])
def test_the_poorest_rank_decides_the_number_of_blocks(ranks: Ranks, qwen3: Task, tmp_path: Path, poor: int) -> None:
    stages = split_layers(7, 3)
    rooms = [40 * BYTES_PER_LAYER * stage for stage in stages]
    rooms[poor] = 25 * BYTES_PER_LAYER * stages[poor] + 1
    config = configure(qwen3.model, qwen3.input, str(tmp_path), (1, 3, 1), stages)
    reports = run(ranks, config, drive_poor, rooms)
    assert [report.num_blocks for report in reports] == [25] * 3
    assert answers(reports) == qwen3.answers


@pytest.mark.parametrize("topology", [(1, 2, 2), (2, 1, 2)])
def test_one_rank_samples_with_the_request_s_own_seed(
    ranks: Ranks, qwen3: Task, tmp_path: Path, topology: tuple[int, int, int]
) -> None:
    reports = run(ranks, configure(qwen3.model, qwen3.input, str(tmp_path), topology))
    assert sum(report.samples for report in reports) == topology[0]
    assert all(bool(report.answers) == report.samples for report in reports)
    first, second = answers(reports)["sampled"]
    assert first != second, "two choices of a row have streams of their own"
    assert [first, second] == qwen3.answers["sampled"]


def test_a_model_longer_than_its_positions_is_refused(qwen3: Task) -> None:
    config = Config(model=ModelConfig(path=qwen3.model, max_model_len=513))
    with pytest.raises(ValueError, match=r"max_model_len=513 is more than the 512 positions"):
        settle(config)
