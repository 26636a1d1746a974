"""The port between a model and whoever computes it: the model says what is computed, a `Backend` alone knows how.

`spmd.backend.plain` is plain PyTorch, runs on any device and is the reference; `spmd.backend.cuda` has the one for
NVIDIA GPUs; `spmd.backend.choose` picks and makes one. A backend belongs to one stage's KV cache and works on one batch
at a time. T are the rows of the batch, one token each.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from spmd.model.batch import Batch
from spmd.model.linear import LinearWeight, LinearWeights
from spmd.parallel.experts import ExpertParallel


class PendingSums:
    """Sums `[T, hidden]` on their way from other ranks. Only the backend that made them can read them.

    That is done once, by `add_norm` or `collect`, and before the next layer with experts.
    """


@dataclass(frozen=True)
class Routing:
    """How a router's logits choose each token's experts: by softmax over all of them, the `top_k` best."""

    num_experts: int
    top_k: int
    normalize: bool  # the chosen ones' weights sum to 1


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

    def linear(self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """The product `[T, out]` of `x` `[T, in]` and a weight `[out, in]`; see `LinearWeight.linear`."""

    def gated_linear(self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
        """silu(gate) * up, `[T, inner]`, of one linear `[2 * inner, in]` that holds gate and then up."""

    def add_norm(
        self, x: Tensor | PendingSums, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """RMS norm of `x + residual`, and the sum, `[T, hidden]` both; without a residual, of x alone.

        May overwrite both. Where x is pending, T are the residual's rows.
        """

    def append(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
        """Norm and rotate queries and keys, and store keys and values in the layer's cache.

        Args:
            layer: counts the stage's own layers from 0.
            qkv: `[T, (heads + 2 * kv_heads) * head_dim]`.
            norms: weights `[head_dim]` of the RMS norms of queries and keys, with `eps`, if there are any.

        Returns:
            Queries `[T, heads, head_dim]`.
        """

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        """Attention of queries to their requests' tokens, as far as `window` reaches: `[T, heads * head_dim]`.

        Follows `append` of the same layer.
        """

    def experts(
        self,
        x: Tensor,
        logits: Tensor,
        routing: Routing,
        gate_up: LinearWeights,
        down: LinearWeights,
        ep: ExpertParallel,
        rows: int,
    ) -> Tensor | PendingSums:
        """The weighted sum of each token's experts, `[T, hidden]`, over all replicas that share them.

        Args:
            x: `[T, hidden]`.
            logits: `[T, num_experts]`.
            gate_up: of this rank's experts, `[own experts, 2 * inner, hidden]`.
            down: `[own experts, hidden, inner]`.
            rows: of each replica that shares the experts, padding included: at least T, equal on all of them.
        """

    def collect(self, sums: Tensor | PendingSums, rows: int) -> Tensor:
        """The first `rows` of sums, once they are there; a tensor is returned as it is."""
