"""What a layer of experts may leave to the next norm: sums that still come from other GPUs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spmd.parallel.peers import PeerRows


@dataclass(frozen=True)
class Sums:
    """Sums `[rows, hidden]` on their way from all ranks. To be taken once, before the next exchange.

    Who takes the first of them (`spmd.model.words`, by Triton) waits for all, also for those that are nobody's: then
    the other ranks are done with what this one overwrites next.
    """

    peers: PeerRows
    rows: int
    dtype: torch.dtype


def landed(x: Tensor | Sums, tokens: int) -> Tensor:
    """`[tokens, hidden]`, once it is there."""
    if isinstance(x, Tensor):
        return x
    from spmd.model.words import take

    return take(x, tokens)
