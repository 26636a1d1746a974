"""The engine on GPUs, one each rank, in float32 and so on plain PyTorch: run as on the CPU, with the same answers."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from spmd.config import Config
from spmd.stage.cuda_graphs import DecodeGraph
from tests.support.driver import Report, answers, configure, drive, run
from tests.support.oracle import Task
from tests.support.ranks import Ranks

TINY_POOL = 18  # blocks: 17 for requests, of which the longest takes 14
OPTIONS: dict[str, dict[str, Any]] = {
    "chunked": {"max_num_batched_tokens": 8},
    "depth1": {"async_depth": 1},
    "preempting": {"num_blocks": TINY_POOL},
    "uncached": {"prefix_caching": False, "prefill": "exclusive"},
    "all": {"max_num_batched_tokens": 8, "async_depth": 1, "num_blocks": TINY_POOL, "decode_buckets": [1]},
}


def solve(
    ranks: Ranks,
    task: Task,
    tmp_path: Path,
    topology: tuple[int, int, int],
    enforce_eager: bool = False,
    **scheduler: Any,
) -> None:
    """Answer a task's rows, and assert that the answers are right and that what was to happen did."""
    config = configure(task.model, task.input, str(tmp_path), topology, **scheduler)
    model = replace(config.model, attention_backend="torch", enforce_eager=enforce_eager)
    reports = run(ranks, replace(config, device="cuda", model=model), drive_counting)
    found = answers(reports)
    assert found.keys() == task.answers.keys()
    assert not {key: (found[key], answer) for key, answer in task.answers.items() if found[key] != answer}
    (leader,) = (report for report in reports if report.answers)
    assert (leader.preemptions > 0) == ("num_blocks" in scheduler)
    assert (leader.cached_tokens > 0) == scheduler.get("prefix_caching", True)


def drive_counting(rank: int, config: Config) -> Report:
    """Also asserts that CUDA graphs were run where they should be, and nowhere else."""
    replay, replayed = DecodeGraph.__call__, []

    def counted(graph: DecodeGraph, *args: Any) -> Tensor:
        replayed.append(1)
        return replay(graph, *args)

    with patch.object(DecodeGraph, "__call__", counted):
        report = drive(rank, config)
    full = [tick for tick in report.ticks if tick.num_decodes and not tick.chunks]
    assert len(full) > 10 and len(replayed) == (0 if config.model.enforce_eager else len(full))
    return report
