"""What the layers of a forward compute with: products with weights, norms, rotation, attention, activation.

A `Backend` belongs to one stage's KV cache and works on one batch at a time. `spmd.backend.plain` is plain PyTorch,
runs on any device and is the reference; `spmd.backend.cuda` has the one for GPUs.
"""

from typing import Protocol

from torch import Tensor

from spmd.model.batch import Batch
from spmd.model.norm import RMSNorm
from spmd.parallel.peer_memory import PendingSums


class Backend(Protocol):
    def prepare(self, batch: Batch) -> None:
        """The host's work before a forward; never part of a CUDA graph."""

    def begin(self, batch: Batch) -> None:
        """What all layers share, computed on the device at the start of a forward."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `spmd.model.weights.linear`."""

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """silu(gate) * up, of one linear that holds both, one after the other."""

    def add_norm(self, x: Tensor | PendingSums, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """`norm(x + residual)` and the sum, `[T, hidden]` both; without a residual, of x alone. May overwrite both."""

    def attend(self, layer: int, qkv: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        """Norm and rotate queries and keys, store keys and values, attend.

        Args:
            layer: counts the stage's own layers from 0.
            qkv: `[T, (heads + 2 * kv_heads) * head_dim]`.

        Returns:
            `[T, heads * head_dim]`.
        """

    def gated(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of `[T, 2 * inner]`."""


def landed(x: Tensor | PendingSums, tokens: int) -> Tensor:
    """`[tokens, hidden]`, once it is there."""
    if isinstance(x, Tensor):
        return x
    from spmd.backend.cuda.exchange_kernels import take

    return take(x, tokens)
