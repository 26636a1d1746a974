"""All-reduce of small tensors between GPUs of one host, through memory that each of them sees.

A decode tick sums two tensors a layer, each of about a megabyte: NCCL's latency would be a fifth of the tick. PyTorch's
symmetric memory needs a barrier and one kernel instead. NVLink multicast isn't used.
"""

import torch
import torch.distributed as dist
from torch import Tensor

MAX_BYTES = 4 * 2**20  # above it NCCL's bandwidth matters more than its latency


class SymmetricBuffer:
    """Room for one tensor at the same place on all ranks of a group. Sums are written where the parts were."""

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype, device: torch.device) -> None:
        """Joins the group's ranks, which must all call it and be `spmd.parallel.peers.within_reach`."""
        import torch.distributed._symmetric_memory as symmetric

        self.memory = symmetric.empty(MAX_BYTES // dtype.itemsize, dtype=dtype, device=device)
        symmetric.rendezvous(self.memory, group)
        self.group_name = group.group_name

    def room(self, rows: int, columns: int) -> Tensor | None:
        """Memory for a tensor `[rows, columns]` that is to be summed, until the next call; None if it is too large."""
        if rows * columns > len(self.memory):
            return None
        return self.memory[: rows * columns].view(rows, columns)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum what lies in the room, in place."""
        return torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self.group_name)
