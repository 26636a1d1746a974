"""Tensor parallelism: the collectives of one stage's ranks, which hold slices of the same layers."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the `size` ranks of its stage. With size 1 nothing is communicated."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def gather_vocab(self, logits: Tensor) -> Tensor | None:
        """Join slices `[S, vocab / size]` to `[S, vocab]` on tp rank 0; None on the others."""
        if self.size == 1:
            return logits
        slices = [torch.empty_like(logits) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(logits.contiguous(), slices, group=self.group, group_dst=0)
        return torch.cat(slices, dim=-1) if slices else None
