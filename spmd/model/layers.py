"""The dense layers of a decoder, each with one tensor-parallel rank's slice: linears, embedding, head, MLP."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd.model.architecture import Architecture
from spmd.model.backend import Backend
from spmd.model.weights import Piece, Weights, empty, linear, shard, whole
from spmd.parallel.tensor import TensorParallel


class ColumnLinear(Weights):
    """One product for several checkpoint linears of the same input, their outputs split over the tp ranks."""

    packable = ("weight",)
    weight: Tensor

    def __init__(
        self, size: int, parts: dict[str, int], bias: bool, dtype: torch.dtype, tp: TensorParallel, halves: int = 1
    ) -> None:
        """`size` is the input's, `parts` the whole output size of each checkpoint linear by name.

        With two `halves` the parts are gate and up, and the output silu(gate) * up.
        """
        super().__init__()
        self.tp = tp
        self.halves = halves
        self.parts = {name: out // tp.size for name, out in parts.items()}
        total = sum(self.parts.values())
        self.weight = empty(dtype, total, size)
        self.bias = empty(dtype, total) if bias else None

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[T, size]` to `[T, sum of the local parts / halves]`, part after part."""
        if self.halves == 2:
            return backend.gated_linear(x, self.weight, self.bias)
        return backend.linear(x, self.weight, self.bias)

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
    halves = 1
    weight: Tensor

    def __init__(self, size: int, out: int, bias: bool, dtype: torch.dtype, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.out = out
        self.weight = empty(dtype, out, size // tp.size)
        self.bias = empty(dtype, out) if bias else None

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[T, size / tp]` to `[T, out]`, equal on all tp ranks."""
        room = self.tp.room(len(x), self.out)
        product = backend.linear(x, self.weight) if room is None else torch.mm(x, self.weight.t(), out=room)
        x = self.tp.all_reduce(product)
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
        x = self.tp.all_reduce(x.masked_fill_(elsewhere[:, None], 0))
        return x.clone() if self.tp.symmetric else x  # the first residual outlasts the next sum, the room doesn't


class Head(Vocabulary):
    """Hidden states `[S, hidden]` to logits `[S, padded vocab / tp]`, this rank's slice."""

    packable = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def gather(self, logits: Tensor) -> Tensor | None:
        """The logits `[S, vocab]` of all slices, on tp rank 0; None on the others."""
        whole = self.tp.gather_vocab(logits)
        return None if whole is None else whole[:, : self.size]

    def argmax(self, logits: Tensor) -> Tensor:
        """The most likely token ids, int64 `[S]`, on every rank, without gathering the slices."""
        return self.tp.argmax_vocab(logits, self.size)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, arch: Architecture, tp: TensorParallel) -> None:
        super().__init__()
        inner, bias = arch.intermediate_size, arch.mlp_bias
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = ColumnLinear(arch.hidden_size, parts, bias, arch.dtype, tp, halves=2)
        self.down_proj = RowLinear(inner, arch.hidden_size, bias, arch.dtype, tp)

    def forward(self, x: Tensor, backend: Backend, shared_rows: int | None = None) -> Tensor:
        """`shared_rows` concerns sparse layers alone."""
        return self.down_proj(self.gate_up_proj(x, backend), backend)
