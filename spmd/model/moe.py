"""Mixture of experts: a router picks a few experts a token.

Either every tensor rank holds a slice of each expert's intermediate, or, with expert parallelism, every rank of the
stage, of all replicas, holds some experts whole. Then the replicas' tokens are gathered before the experts, together
with what the router of their own replica chose for them, so that no two ranks can differ about it; afterwards each
replica gets the sums of its own tokens. The backend does both.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from spmd.model.architecture import Architecture
from spmd.model.backend import Backend, ExpertLayer, Sums
from spmd.model.linear import Dense, WeightFormat
from spmd.model.weights import Piece, Weights, shard, whole
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel


class Router(Weights):
    """Scores the experts for each token."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.weight = Dense(arch.dtype, arch.num_experts, arch.hidden_size)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[T, hidden]` to logits `[T, experts]`."""
        return backend.linear(x, self.weight)

    def pieces(self, own: str) -> Iterator[Piece]:
        yield whole(f"{own}.weight", self.weight.values)


class Experts(Weights):
    """The experts' MLPs in stacked weights: `[own experts, 2 * inner, hidden]` and `[own experts, hidden, inner]`."""

    packable = ("gate_up_proj", "down_proj")
    gate_up_proj: WeightFormat
    down_proj: WeightFormat

    def __init__(self, arch: Architecture, tp: TensorParallel, ep: ExpertParallel) -> None:
        super().__init__()
        self.tp = tp if ep.size == 1 else TensorParallel()
        self.num_experts = arch.num_experts
        self.owned = ep.owned(arch.num_experts)
        inner = arch.moe_intermediate_size // self.tp.size
        self.gate_up_proj = arch.weight_format(arch.dtype, len(self.owned), 2 * inner, arch.hidden_size)
        self.down_proj = arch.weight_format(arch.dtype, len(self.owned), arch.hidden_size, inner)

    def pieces(self, own: str) -> Iterator[Piece]:
        """One tensor an expert and projection, as checkpoints have it."""
        for suffix, tensor, _ in self.gate_up_proj.stored():
            for expert, gate_up in zip(self.owned, tensor, strict=True):
                for name, part in zip(("gate_proj", "up_proj"), gate_up.chunk(2), strict=True):
                    yield shard(f"{own}.{expert}.{name}.{suffix}", part, 0, self.tp)
        for suffix, tensor, _ in self.down_proj.stored():
            for expert, down in zip(self.owned, tensor, strict=True):
                yield shard(f"{own}.{expert}.down_proj.{suffix}", down, 1, self.tp)

    def stacked_pieces(self, own: str) -> Iterator[Piece]:
        """All experts in one tensor a projection, as transformers 5 holds them and may save them."""
        for suffix, tensor, _ in self.gate_up_proj.stored():
            halves = tensor.chunk(2, dim=1)
            size = halves[0].shape[1] * self.tp.size
            for i, half in enumerate(halves):
                name = f"{own}.gate_up_proj{suffix.removeprefix('weight')}"
                yield self._of_all(shard(name, half, 1, self.tp, offset=i * size, total=2 * size))
        for suffix, tensor, _ in self.down_proj.stored():
            yield self._of_all(shard(f"{own}.down_proj{suffix.removeprefix('weight')}", tensor, 2, self.tp))

    def _of_all(self, piece: Piece) -> Piece:
        """A piece of a tensor that begins with all experts instead of the own ones."""
        here = slice(self.owned.start, self.owned.stop)
        return replace(piece, shape=(self.num_experts, *piece.shape[1:]), index=(here, *piece.index[1:]))


class SparseMLP(nn.Module):
    """Router and experts in the place of an MLP."""

    def __init__(self, arch: Architecture, tp: TensorParallel, ep: ExpertParallel) -> None:
        super().__init__()
        self.choice = arch.num_experts, arch.experts_per_token, arch.norm_topk_prob
        self.tp = tp
        self.ep = ep
        self.gate = Router(arch)
        self.experts = Experts(arch, tp, ep)

    def forward(self, x: Tensor, backend: Backend, shared_rows: int | None = None) -> Sums:
        """`[T, hidden]` both; where replicas share the experts, each of them must give the same `shared_rows` >= T."""
        rows = len(x) if self.ep.group is None else shared_rows
        assert rows is not None, "replicas that share experts must agree on their rows"
        layer = ExpertLayer(*self.choice, self.experts.gate_up_proj, self.experts.down_proj, self.ep)
        sums = backend.experts(x, self.gate(x, backend), layer, rows)
        return sums if self.tp.size == 1 else self.tp.all_reduce(backend.collect(sums, len(x)))
