"""Mixture of experts: a router picks a few experts a token; every rank holds a slice of each expert's intermediate."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd.model.architecture import Architecture
from spmd.model.backend import Backend
from spmd.model.weights import Piece, Weights, empty, linear, shard, whole
from spmd.parallel.tensor import TensorParallel


class Router(Weights):
    """Chooses the experts of each token by softmax over all of them."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.top_k = arch.experts_per_token
        self.normalize = arch.norm_topk_prob
        self.weight = empty(arch.dtype, arch.num_experts, arch.hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in x's dtype and expert ids, both `[T, top_k]`."""
        probabilities = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), experts

    def pieces(self, own: str) -> Iterator[Piece]:
        yield whole(f"{own}.weight", self.weight)


class Experts(Weights):
    """The experts' MLPs in stacked weights. Only those that some token chose are run, each on its tokens at once."""

    packable = ("gate_up_proj", "down_proj")
    gate_up_proj: Tensor | Sequence[Tensor]  # [experts, 2 * inner, hidden]
    down_proj: Tensor | Sequence[Tensor]  # [experts, hidden, inner]

    def __init__(self, arch: Architecture, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.num_experts = arch.num_experts
        self.inner = arch.moe_intermediate_size // tp.size
        self.gate_up_proj = empty(arch.dtype, arch.num_experts, 2 * self.inner, arch.hidden_size)
        self.down_proj = empty(arch.dtype, arch.num_experts, arch.hidden_size, self.inner)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, backend: Backend) -> Tensor:
        """This rank's share of the weighted sum of each token's experts, `[T, hidden]`."""
        tokens, top_k = experts.shape
        chosen, order = experts.flatten().sort(stable=True)
        inputs = x[order // top_k]
        grouped = x.is_cuda and x.dtype == torch.bfloat16
        outputs = self._grouped(inputs, chosen, backend) if grouped else self._one_by_one(inputs, chosen, backend)
        by_token = torch.empty(tokens * top_k, x.shape[1], dtype=x.dtype, device=x.device)
        by_token[order] = outputs
        return (by_token.view(tokens, top_k, -1) * weights.unsqueeze(-1)).sum(dim=1)

    def _one_by_one(self, inputs: Tensor, chosen: Tensor, backend: Backend) -> Tensor:
        counts = chosen.bincount(minlength=self.num_experts).tolist()
        return torch.cat(
            [
                linear(backend.gated(linear(part, self.gate_up_proj[expert])), self.down_proj[expert])
                for expert, part in enumerate(inputs.split(counts))
                if len(part)
            ]
        )

    def _grouped(self, inputs: Tensor, chosen: Tensor, backend: Backend) -> Tensor:
        """One product for all experts, whose rows end where `ends` says: the host need not know."""
        assert isinstance(self.gate_up_proj, Tensor) and isinstance(self.down_proj, Tensor)
        numbers = torch.arange(self.num_experts, device=chosen.device)
        ends = torch.searchsorted(chosen, numbers, right=True, out_int32=True)
        inner = backend.gated(F.grouped_mm(inputs, self.gate_up_proj.transpose(1, 2), offs=ends))
        return F.grouped_mm(inner, self.down_proj.transpose(1, 2), offs=ends)

    def pieces(self, own: str) -> Iterator[Piece]:
        """One tensor an expert and projection, as checkpoints have it."""
        for expert in range(self.num_experts):
            gate, up = self.gate_up_proj[expert].chunk(2)
            yield shard(f"{own}.{expert}.gate_proj.weight", gate, 0, self.tp)
            yield shard(f"{own}.{expert}.up_proj.weight", up, 0, self.tp)
            yield shard(f"{own}.{expert}.down_proj.weight", self.down_proj[expert], 1, self.tp)

    def stacked_pieces(self, own: str) -> Iterator[Piece]:
        """All experts in one tensor a projection, as transformers 5 holds them and may save them."""
        assert isinstance(self.gate_up_proj, Tensor) and isinstance(self.down_proj, Tensor)
        size = self.inner * self.tp.size
        for half, target in enumerate(self.gate_up_proj.chunk(2, dim=1)):
            yield shard(f"{own}.gate_up_proj", target, 1, self.tp, offset=half * size, total=2 * size)
        yield shard(f"{own}.down_proj", self.down_proj, 2, self.tp)


class SparseMLP(nn.Module):
    """Router and experts in the place of an MLP."""

    def __init__(self, arch: Architecture, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.gate = Router(arch)
        self.experts = Experts(arch, tp)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        weights, experts = self.gate(x)
        return self.tp.all_reduce(self.experts(x, weights, experts, backend))
