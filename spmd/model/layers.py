"""The dense layers of a decoder, each with one tensor-parallel rank's slice: norm, linears, embedding, head, MLP."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd.model.architecture import Architecture
from spmd.model.weights import Piece, Weights, empty, linear, shard, whole
from spmd.parallel.tensor import TensorParallel


class RMSNorm(Weights):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, arch: Architecture) -> None:
        super().__init__()
        self.eps = arch.rms_norm_eps
        self.weight = empty(arch.dtype, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def pieces(self, own: str) -> Iterator[Piece]:
        yield whole(f"{own}.weight", self.weight)


class ColumnLinear(Weights):
    """One product for several checkpoint linears of the same input, their outputs split over the tp ranks."""

    packable = ("weight",)
    weight: Tensor

    def __init__(self, size: int, parts: dict[str, int], bias: bool, dtype: torch.dtype, tp: TensorParallel) -> None:
        """`size` is the input's, `parts` the whole output size of each checkpoint linear by name."""
        super().__init__()
        self.tp = tp
        self.parts = {name: out // tp.size for name, out in parts.items()}
        total = sum(self.parts.values())
        self.weight = empty(dtype, total, size)
        self.bias = empty(dtype, total) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[T, size]` to `[T, sum of the local parts]`, part after part."""
        return linear(x, self.weight, self.bias)

    def pieces(self, own: str) -> Iterator[Piece]:
        sizes = list(self.parts.values())
        for name, weight in zip(self.parts, self.weight.split(sizes), strict=True):
            yield shard(f"{name}.weight", weight, 0, self.tp)
        if self.bias is not None:
            for name, bias in zip(self.parts, self.bias.split(sizes), strict=True):
                yield shard(f"{name}.bias", bias, 0, self.tp)


class RowLinear(Weights):
    """A linear whose input is split over the tp ranks; the ranks' partial outputs are summed."""

    packable = ("weight",)
    weight: Tensor

    def __init__(self, size: int, out: int, bias: bool, dtype: torch.dtype, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = empty(dtype, out, size // tp.size)
        self.bias = empty(dtype, out) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[T, size / tp]` to `[T, out]`, equal on all tp ranks."""
        x = self.tp.all_reduce(linear(x, self.weight))
        return x if self.bias is None else x + self.bias

    def pieces(self, own: str) -> Iterator[Piece]:
        yield shard(f"{own}.weight", self.weight, 1, self.tp)
        if self.bias is not None:
            yield whole(f"{own}.bias", self.bias)


class Vocabulary(Weights):
    """A `[vocab, hidden]` matrix split by rows over the tp ranks, zero rows making it divisible."""

    weight: Tensor

    def __init__(self, arch: Architecture, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.size = arch.vocab_size
        self.weight = empty(arch.dtype, arch.padded_vocab_size(tp.size) // tp.size, arch.hidden_size)
        self.weight[max(0, self.size - tp.rank * len(self.weight)) :].zero_()

    def pieces(self, own: str) -> Iterator[Piece]:
        yield shard(f"{own}.weight", self.weight, 0, self.tp, self.size)


class Embedding(Vocabulary):
    """Token ids `[T]` to hidden states `[T, hidden]`, equal on all tp ranks."""

    def forward(self, ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(ids, self.weight)
        ids = ids - self.tp.rank * len(self.weight)
        elsewhere = (ids < 0) | (ids >= len(self.weight))
        x = F.embedding(ids.masked_fill(elsewhere, 0), self.weight)
        return self.tp.all_reduce(x.masked_fill_(elsewhere[:, None], 0))


class Head(Vocabulary):
    """Hidden states `[S, hidden]` to float32 logits `[S, vocab]` on tp rank 0, None on the others."""

    packable = ("weight",)

    def forward(self, x: Tensor) -> Tensor | None:
        logits = self.tp.gather_vocab(linear(x, self.weight))
        return None if logits is None else logits[:, : self.size].float()


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, arch: Architecture, tp: TensorParallel) -> None:
        super().__init__()
        inner, bias = arch.intermediate_size, arch.mlp_bias
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = ColumnLinear(arch.hidden_size, parts, bias, arch.dtype, tp)
        self.down_proj = RowLinear(inner, arch.hidden_size, bias, arch.dtype, tp)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_up_proj(x)))


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of `[T, 2 * inner]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
