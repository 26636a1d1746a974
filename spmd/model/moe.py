"""Mixture of experts: a router picks a few experts a token.

Either every tensor rank holds a slice of each expert's intermediate, or, with expert parallelism, every rank of the
stage, of all replicas, holds some experts whole. Then the replicas' tokens are gathered before the experts, together
with what the router of their own replica chose for them, so that no two ranks can differ about it; afterwards each
replica gets the sums of its own tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd.model.architecture import Architecture
from spmd.model.backend import Backend, landed
from spmd.model.weights import Piece, Weights, empty, linear, shard, whole
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.peer_memory import PeerMemory, PendingSums
from spmd.parallel.tensor import TensorParallel


class Routed(NamedTuple):
    """Tokens and where they go. Expert -1 is nobody's."""

    x: Tensor  # [T, hidden]
    weights: Tensor  # [T, top_k], in x's dtype
    experts: Tensor  # [T, top_k], integers

    def packed(self) -> Tensor:
        """All in one tensor `[T, hidden + 2 * top_k]`, to travel at once; a row of zeros goes to nobody."""
        numbers = self.experts.to(_integers(self.x)) + 1
        return torch.cat([self.x, self.weights, numbers.view(self.x.dtype)], dim=1)

    @staticmethod
    def unpacked(packed: Tensor, top_k: int) -> "Routed":
        x, weights, numbers = packed.tensor_split([-2 * top_k, -top_k], dim=1)
        return Routed(x, weights, numbers.view(_integers(packed)) - 1)


def _integers(x: Tensor) -> torch.dtype:
    """Of the same size as x's elements."""
    return torch.int16 if x.element_size() == 2 else torch.int32


class Router(Weights):
    """Chooses the experts of each token by softmax over all of them."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.top_k = arch.experts_per_token
        self.normalize = arch.norm_topk_prob
        self.weight = empty(arch.dtype, arch.num_experts, arch.hidden_size)

    def forward(self, x: Tensor) -> Routed:
        probabilities = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routed(x, weights.to(x.dtype), experts)

    def by_kernel(self, x: Tensor, rows: int, peers: PeerMemory | None) -> Tensor:
        """The same, packed, in bfloat16 on a GPU; padded to `rows` rows that are nobody's. With peers, also theirs."""
        from spmd.backend.cuda.expert_kernels import choose

        return choose(x, F.linear(x, self.weight), rows, self.top_k, self.normalize, peers)

    def pieces(self, own: str) -> Iterator[Piece]:
        yield whole(f"{own}.weight", self.weight)


class Experts(Weights):
    """The experts' MLPs in stacked weights. Only those that some token chose are run, each on its tokens at once."""

    packable = ("gate_up_proj", "down_proj")
    gate_up_proj: Tensor | Sequence[Tensor]  # [own experts, 2 * inner, hidden]
    down_proj: Tensor | Sequence[Tensor]  # [own experts, hidden, inner]

    def __init__(self, arch: Architecture, tp: TensorParallel, ep: ExpertParallel) -> None:
        super().__init__()
        self.tp = tp if ep.size == 1 else TensorParallel()
        self.num_experts = arch.num_experts
        self.owned = ep.owned(arch.num_experts)
        self.inner = arch.moe_intermediate_size // self.tp.size
        self.gate_up_proj = empty(arch.dtype, len(self.owned), 2 * self.inner, arch.hidden_size)
        self.down_proj = empty(arch.dtype, len(self.owned), arch.hidden_size, self.inner)

    def forward(self, routed: Routed, backend: Backend) -> Tensor:
        """This rank's share of the weighted sum of each token's experts, `[T, hidden]`."""
        x, weights, experts = routed
        tokens, top_k = experts.shape
        if len(self.owned) < self.num_experts:  # counted from the first own one; others', and nobody's, come behind
            experts = (experts - self.owned.start).remainder(self.num_experts + 1)
        chosen, order = experts.flatten().sort(stable=True)
        counts = chosen.bincount(minlength=len(self.owned))[: len(self.owned)].tolist()
        outputs = x.new_zeros(len(order), x.shape[1])
        here = order[: sum(counts)]
        for expert, (places, part) in enumerate(zip(here.split(counts), x[here // top_k].split(counts), strict=True)):
            if len(part):
                inner = backend.gated(linear(part, self.gate_up_proj[expert]))
                outputs[places] = linear(inner, self.down_proj[expert])
        return (outputs.view(tokens, top_k, -1) * weights.unsqueeze(-1)).sum(dim=1)

    def by_kernels(self, packed: Tensor, top_k: int, peers: PeerMemory | None = None) -> Tensor | PendingSums:
        """The same of `Routed.packed` in bfloat16 on a GPU; the host need not know how many tokens an expert gets.

        With peers, the sums of all ranks' shares, of this rank's tokens alone.
        """
        from spmd.backend.cuda.expert_kernels import mix

        assert isinstance(self.gate_up_proj, Tensor) and isinstance(self.down_proj, Tensor)
        return mix(packed, top_k, self.owned.start, self.gate_up_proj, self.down_proj, peers)

    def pieces(self, own: str) -> Iterator[Piece]:
        """One tensor an expert and projection, as checkpoints have it."""
        for expert, gate_up, down in zip(self.owned, self.gate_up_proj, self.down_proj, strict=True):
            gate, up = gate_up.chunk(2)
            yield shard(f"{own}.{expert}.gate_proj.weight", gate, 0, self.tp)
            yield shard(f"{own}.{expert}.up_proj.weight", up, 0, self.tp)
            yield shard(f"{own}.{expert}.down_proj.weight", down, 1, self.tp)

    def stacked_pieces(self, own: str) -> Iterator[Piece]:
        """All experts in one tensor a projection, as transformers 5 holds them and may save them."""
        assert isinstance(self.gate_up_proj, Tensor) and isinstance(self.down_proj, Tensor)
        size = self.inner * self.tp.size
        for half, target in enumerate(self.gate_up_proj.chunk(2, dim=1)):
            yield self._of_all(shard(f"{own}.gate_up_proj", target, 1, self.tp, offset=half * size, total=2 * size))
        yield self._of_all(shard(f"{own}.down_proj", self.down_proj, 2, self.tp))

    def _of_all(self, piece: Piece) -> Piece:
        """A piece of a tensor that begins with all experts instead of the own ones."""
        here = slice(self.owned.start, self.owned.stop)
        return replace(piece, shape=(self.num_experts, *piece.shape[1:]), index=(here, *piece.index[1:]))


class SparseMLP(nn.Module):
    """Router and experts in the place of an MLP."""

    def __init__(self, arch: Architecture, tp: TensorParallel, ep: ExpertParallel) -> None:
        super().__init__()
        self.tp = tp
        self.ep = ep
        self.gate = Router(arch)
        self.experts = Experts(arch, tp, ep)

    def forward(self, x: Tensor, backend: Backend, shared_rows: int | None = None) -> Tensor | PendingSums:
        """`[T, hidden]` both; where replicas share the experts, each of them must give the same `shared_rows` >= T.

        What is pending must be used before the next sparse layer.
        """
        rows = len(x) if self.ep.group is None else shared_rows
        assert rows is not None, "replicas that share experts must agree on their rows"
        if x.is_cuda and x.dtype == torch.bfloat16:
            pending = self._by_kernels(x, rows)
            if isinstance(pending, PendingSums) and self.tp.size == 1:
                return pending
            sums = landed(pending, len(x))
        else:
            routed = self.gate(x)
            if self.ep.group is not None:
                routed = Routed.unpacked(self.ep.gather(routed.packed(), rows), self.gate.top_k)
            sums = self.ep.scatter_sum(self.experts(routed, backend))
        return self.tp.all_reduce(sums[: len(x)])

    def _by_kernels(self, x: Tensor, rows: int) -> Tensor | PendingSums:
        peers = self.ep.room(rows)
        packed = self.gate.by_kernel(x, rows, peers)
        if peers:
            return self.experts.by_kernels(packed, self.gate.top_k, peers)
        shares = self.experts.by_kernels(self.ep.gather(packed, rows), self.gate.top_k)
        assert isinstance(shares, Tensor)
        return self.ep.scatter_sum(shares)
