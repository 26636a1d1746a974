"""Tensor parallelism: the collectives of one stage's ranks, which hold slices of the same layers."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from spmd.parallel.peer_memory import SymmetricBuffer
from spmd.schedule.request import NO_TOKEN


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the `size` ranks of its stage. With size 1 nothing is communicated."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    symmetric: SymmetricBuffer | None = None

    def sum_buffer(self, rows: int, columns: int) -> Tensor | None:
        """Where to write `[rows, columns]` that will be summed, if anywhere: it is then spared a copy."""
        return self.symmetric.view(rows, columns) if self.symmetric else None

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum `x` over the ranks; in place, or in the buffer, where it lasts until the next call."""
        if self.size == 1:
            return x
        buffer = self.sum_buffer(*x.shape)
        if self.symmetric is None or buffer is None:
            dist.all_reduce(x, group=self.group)
            return x
        return self.symmetric.all_reduce(buffer if x.data_ptr() == buffer.data_ptr() else buffer.copy_(x))

    def gather_vocab(self, logits: Tensor) -> Tensor | None:
        """Join slices `[S, vocab / size]` to `[S, vocab]` on tp rank 0; None on the others."""
        if self.size == 1:
            return logits
        slices = [torch.empty_like(logits) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(logits.contiguous(), slices, group=self.group, group_dst=0)
        return torch.cat(slices, dim=-1) if slices else None

    def argmax_vocab(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Most likely token of each row, int64 [S], equal on all ranks, from their slices `[S, padded vocab / size]`.

        The same as `likeliest` of the joined logits. Columns from `vocab_size` on are padding and never win. Two
        numbers a row travel instead of the logits, and the host waits for nothing.
        """
        if self.size == 1:
            return likeliest(logits[:, :vocab_size])
        offset = self.rank * logits.shape[1]
        if (padding := min(offset + logits.shape[1] - vocab_size, logits.shape[1])) > 0:
            logits = F.pad(logits[:, :-padding], (0, padding), value=float("-inf"))
        value, token = logits.max(-1)
        # A float64 holds a logit of any narrower type and a token id exactly.
        mine = torch.stack([value.double(), (token + offset).double()])
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        values, tokens = torch.stack(everyone, dim=1)
        best, rank = values.max(0)
        return token_or_none(best, tokens.gather(0, rank[None])[0].long())


def likeliest(logits: Tensor) -> Tensor:
    """The most likely token of each row, int64 [S] of `[S, vocab]`: of equal ones the first.

    NO_TOKEN where the largest logit is NaN or infinite: one NaN in a row is larger than all else.
    """
    return token_or_none(*logits.max(-1))  # indices as of `argmax`, which takes four times as long on CPUs


def token_or_none(best: Tensor, token_ids: Tensor) -> Tensor:
    """`token_ids` [S], but NO_TOKEN where the row's best score, of `best` [S], is no finite number."""
    return torch.where(best.isfinite(), token_ids, NO_TOKEN)
