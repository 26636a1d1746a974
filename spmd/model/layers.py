"""The dense layers of a decoder, each with one tensor-parallel rank's slice: norm, linears, embedding, head, MLP."""

from collections.abc import Iterator

from torch import Tensor, nn

from spmd.model.architecture import Architecture
from spmd.model.backend import Backend, Sums
from spmd.model.linear import Dense, Stored, WeightFormat
from spmd.model.weights import Piece, Weights, empty, shard, whole
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel


class RMSNorm(Weights):
    """x / rms(x) * weight over the last dimension, computed in float32: the norm of all supported families."""

    def __init__(self, size: int, arch: Architecture) -> None:
        super().__init__()
        self.eps = arch.rms_norm_eps
        self.weight = empty(arch.dtype, size)

    def forward(self, x: Sums, residual: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:
        """Of `x + residual`, and that sum; see `Backend.add_norm`."""
        return backend.add_norm(x, residual, self.weight, self.eps)

    def pieces(self, own: str) -> Iterator[Piece]:
        yield whole(f"{own}.weight", self.weight)


class ColumnLinear(Weights):
    """One product for several checkpoint linears of the same input, their outputs split over the tp ranks."""

    packable = ("weight",)
    weight: WeightFormat

    def __init__(self, arch: Architecture, size: int, parts: dict[str, int], bias: bool, tp: TensorParallel) -> None:
        """`size` is the input's, `parts` the whole output size of each checkpoint linear by name."""
        super().__init__()
        self.tp = tp
        self.parts = {name: out // tp.size for name, out in parts.items()}
        total = sum(self.parts.values())
        self.weight = arch.weight_format(arch.dtype, total, size)
        self.bias = empty(arch.dtype, total) if bias else None

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[T, size]` to `[T, sum of the local parts]`, part after part."""
        return backend.linear(x, self.weight, self.bias)

    def pieces(self, own: str) -> Iterator[Piece]:
        stored = [*self.weight.stored(), *([Stored("bias", self.bias)] if self.bias is not None else [])]
        for suffix, tensor, block in stored:
            sizes = [size // block for size in self.parts.values()]
            for name, part in zip(self.parts, tensor.split(sizes), strict=True):
                yield shard(f"{name}.{suffix}", part, 0, self.tp)


class GatedLinear(ColumnLinear):
    """Gate and up of an MLP, and their activation: silu(gate(x)) * up(x)."""

    def __init__(self, arch: Architecture, size: int, inner: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__(arch, size, {"gate_proj": inner, "up_proj": inner}, bias, tp)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[T, size]` to `[T, inner / tp]`."""
        return backend.gated_linear(x, self.weight, self.bias)


class RowLinear(Weights):
    """A linear whose input is split over the tp ranks; the ranks' partial outputs are summed."""

    packable = ("weight",)
    weight: WeightFormat

    def __init__(self, arch: Architecture, size: int, out: int, bias: bool, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.out = out
        self.weight = arch.weight_format(arch.dtype, out, size // tp.size)
        self.bias = empty(arch.dtype, out) if bias else None

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        """`[T, size / tp]` to `[T, out]`, equal on all tp ranks."""
        partial = backend.linear(x, self.weight, out=self.tp.sum_buffer(len(x), self.out))
        x = self.tp.all_reduce(partial)
        return x if self.bias is None else x + self.bias

    def pieces(self, own: str) -> Iterator[Piece]:
        for suffix, tensor, _ in self.weight.stored():
            yield shard(f"{own}.{suffix}", tensor, 1, self.tp)
        if self.bias is not None:
            yield whole(f"{own}.bias", self.bias)


class Vocabulary(Weights):
    """A `[vocab, hidden]` matrix split by rows over the tp ranks, zero rows making it divisible."""

    weight: Dense

    def __init__(self, arch: Architecture, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.size = arch.vocab_size
        self.rows = arch.padded_vocab_size(tp.size) // tp.size
        self.weight = Dense(arch.dtype, self.rows, arch.hidden_size)
        self.weight.values[max(0, self.size - tp.rank * self.rows) :].zero_()

    def pieces(self, own: str) -> Iterator[Piece]:
        yield shard(f"{own}.weight", self.weight.values, 0, self.tp, self.size)


class Embedding(Vocabulary):
    """Token ids `[T]` to hidden states `[T, hidden]`, equal on all tp ranks."""

    def forward(self, ids: Tensor, backend: Backend) -> Tensor:
        if self.tp.size == 1:
            return backend.embedding(ids, self.weight.values)
        ids = ids - self.tp.rank * self.rows
        elsewhere = (ids < 0) | (ids >= self.rows)
        x = backend.embedding(ids.masked_fill(elsewhere, 0), self.weight.values)
        x = self.tp.all_reduce(x.masked_fill_(elsewhere[:, None], 0))
        return x.clone() if self.tp.symmetric else x  # the first residual outlasts the next sum, the buffer doesn't


class Head(Vocabulary):
    """Hidden states `[S, hidden]` to logits `[S, padded vocab / tp]`, this rank's slice."""

    packable = ("weight",)

    def forward(self, x: Tensor, backend: Backend) -> Tensor:
        return backend.linear(x, self.weight)

    def gather(self, logits: Tensor) -> Tensor | None:
        """The logits `[S, vocab]` of all slices, on tp rank 0; None on the others."""
        whole = self.tp.gather_vocab(logits)
        return None if whole is None else whole[:, : self.size]

    def argmax(self, logits: Tensor) -> Tensor:
        """The most likely token ids, int64 `[S]`, on every rank, without gathering the slices."""
        return self.tp.argmax_vocab(logits, self.size)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, arch: Architecture, tp: TensorParallel, ep: ExpertParallel) -> None:
        super().__init__()
        inner, bias = arch.intermediate_size, arch.mlp_bias
        self.gate_up_proj = GatedLinear(arch, arch.hidden_size, inner, bias, tp)
        self.down_proj = RowLinear(arch, inner, arch.hidden_size, bias, tp)

    def forward(self, x: Tensor, backend: Backend, shared_rows: int | None = None) -> Tensor:
        """`[T, hidden]` both; `shared_rows` concerns layers with experts alone."""
        added: Tensor = self.down_proj(self.gate_up_proj(x, backend), backend)
        return added
