"""Sums made in one piece of memory, each over the last one, as GPUs do it: whatever must outlast a sum is elsewhere."""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from spmd.config import Config
from tests.support.driver import Report, answers, configure, drive, run
from tests.support.oracle import Task
from tests.support.ranks import Ranks


class Buffer:
    """What `SymmetricBuffer` is, for CPUs."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self.group = group
        self.memory = torch.empty(2**16, dtype=dtype)

    def view(self, rows: int, columns: int) -> Tensor:
        return self.memory[: rows * columns].view(rows, columns)

    def all_reduce(self, x: Tensor) -> Tensor:
        assert x.data_ptr() == self.memory.data_ptr()
        dist.all_reduce(x, group=self.group)
        return x


def drive_in_one_buffer(rank: int, config: Config) -> Report:
    def make(group: dist.ProcessGroup | None, dtype: torch.dtype, device: torch.device) -> Buffer:
        assert group is not None
        return Buffer(group, dtype)

    # Weights in oneDNN's order are for CPUs alone, where there is no such buffer.
    with patch("spmd.stage.build.symmetric_buffer", make), patch("spmd.model.decoder.Decoder.pack"):
        return drive(rank, config)


@pytest.mark.parametrize("topology", [(1, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("model", ["qwen3", "qwen2", "mistral", "mixtral"])
def test_nothing_is_lost_when_every_sum_is_made_in_one_place(
    ranks: Ranks, task: Callable[[str], Task], tmp_path: Path, model: str, topology: tuple[int, int, int]
) -> None:
    solved = task(model)
    config = configure(solved.model, solved.input, str(tmp_path), topology)
    assert answers(run(ranks, config, drive_in_one_buffer)) == solved.answers
