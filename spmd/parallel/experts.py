"""Expert parallelism: the ranks of one stage, of all replicas, share out the experts of each layer, each of them whole.

Replicas run different tokens, so all of them must take part in every sparse layer at once, with equally many rows.
"""

from dataclasses import dataclass

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from spmd.parallel.peer_memory import PeerMemory

# PyTorch 2.13 warns of the old names, 2.11 and 2.12 have no others.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class ExpertParallel:
    """This rank's place, `dp_rank * tp + tp_rank`, among the `size` = `dp * tp` ranks of its stage.

    `group` joins the ranks of equal tp_rank, one of each replica; None if there is one replica. Ranks that differ in
    tp_rank see the same tokens and need no gathering. With `peers`, memory of these ranks that each of them writes to,
    a backend's kernels do what `gather` and `scatter_sum` do.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    peers: PeerMemory | None = None

    def owned(self, num_experts: int) -> range:
        """The experts of each layer that this rank holds, of `num_experts`, which `size` divides."""
        count = num_experts // self.size
        return range(self.rank * count, (self.rank + 1) * count)

    def peers_for(self, rows: int) -> PeerMemory | None:
        """The ranks' memory, if there is any and it takes `rows` rows of each replica."""
        return self.peers if self.peers and rows * self.peers.size <= self.peers.capacity else None

    def gather(self, x: Tensor, rows: int) -> Tensor:
        """`x` `[T, columns]` of every replica, each padded with zeros to `rows` rows: `[dp * rows, columns]`."""
        if self.group is None:
            return x
        assert len(x) <= rows, f"{len(x)} rows where the replicas agreed on {rows}"
        if len(x) < rows:
            x = F.pad(x, (0, 0, 0, rows - len(x)))
        everyone = x.new_empty(self.group.size() * rows, x.shape[1])
        _all_gather(everyone, x.contiguous(), group=self.group)
        return everyone

    def scatter_sum(self, x: Tensor) -> Tensor:
        """Sum `x` `[dp * rows, columns]` over the replicas; returns this one's rows of it, `[rows, columns]`."""
        if self.group is None:
            return x
        mine = x.new_empty(len(x) // self.group.size(), x.shape[1])
        _reduce_scatter(mine, x, group=self.group)
        return mine
