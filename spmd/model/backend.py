"""The port between a model and whoever computes it: the model says what is computed, a `Backend` alone knows how.

`spmd.backend.plain` is plain PyTorch, runs on any device and is the reference; `spmd.backend.cuda` has the one for
NVIDIA GPUs; `spmd.backend.choose` picks and makes one. A backend belongs to one stage's KV cache and works on one batch
at a time. T are the rows of the batch, one token each; layers count from 0 at the stage's first.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from spmd.model.batch import Batch
from spmd.model.linear import Weight, WeightStack
from spmd.parallel.experts import ExpertParallel


class PendingSums:
    """Sums `[T, hidden]` on their way from other ranks. Only the backend that made them can read them.

    That is done once, by `add_norm` or `collect`, and before the next layer with experts.
    """


Sums = Tensor | PendingSums


@dataclass(frozen=True)
class ExpertLayer:
    """A layer's experts, and how they are chosen: the best by softmax over all of a router's logits."""

    num_experts: int
    top_k: int  # experts of a token
    normalize: bool  # the weights of these sum to 1
    gate_up: WeightStack  # of this rank's experts: [own experts, 2 * inner, hidden]
    down: WeightStack  # [own experts, hidden, inner]
    ep: ExpertParallel  # which ranks have the others


class Backend(Protocol):
    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold a forward of decode rows: none of its kernels needs the host in between."""

    def prepare(self, batch: Batch) -> None:
        """The host's work before a forward; never part of a CUDA graph."""

    def begin(self, batch: Batch) -> None:
        """What all layers share, computed on the device at the start of a forward."""

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        """Rows `ids` `[T]` of `weight` `[vocab, hidden]`: `[T, hidden]`."""

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """See `Weight.linear`."""

    def gated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        """silu(gate) * up, `[T, inner]`, of one linear `[2 * inner, in]` that holds gate and then up."""

    def add_norm(self, x: Sums, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """RMS norm of `x + residual`, and the sum, `[T, hidden]` both; without a residual, of x alone.

        May overwrite both. Where x is pending, T are the residual's rows.
        """

    def append(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
        """Norm and rotate queries and keys, store keys and values in the cache; returns the queries.

        Args:
            qkv: `[T, (heads + 2 * kv_heads) * head_dim]`.
            norms: weights `[head_dim]` of the RMS norms of queries and keys, with `eps`, if there are any.
        """

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        """Attention to what requests have in the cache, as far as `window` reaches: `[T, heads * head_dim]`.

        Takes what `append` of the same layer returned just before.
        """

    def experts(self, x: Tensor, logits: Tensor, layer: ExpertLayer, rows: int) -> Sums:
        """The weighted sum of each token's experts, `[T, hidden]`, over all replicas that share them.

        Args:
            x, logits: `[T, hidden]`, `[T, num_experts]`.
            rows: that each replica which shares the experts has, padding included: at least T, equal on all of them.
        """

    def collect(self, sums: Sums, rows: int) -> Tensor:
        """The first `rows` of sums, once they are there; a tensor is returned as it is."""
