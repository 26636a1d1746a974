"""What the layers of a forward compute with: products with weights, norms, rotation, attention, activation.

A `Backend` belongs to one stage's KV cache and works on one batch at a time. This one is plain PyTorch, runs on any
device and is the reference; `spmd.model.fused` has the one for GPUs.
"""

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from spmd.model.architecture import Architecture
from spmd.model.attention import AttentionPlan
from spmd.model.batch import Batch
from spmd.model.kv_cache import KVCache
from spmd.model.norm import RMSNorm
from spmd.model.rope import Rotary, rotate
from spmd.model.sums import Sums, landed
from spmd.model.weights import linear


class Backend(Protocol):
    def prepare(self, batch: Batch) -> None:
        """The host's work before a forward; never part of a CUDA graph."""

    def begin(self, batch: Batch) -> None:
        """What all layers share, computed on the device at the start of a forward."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `spmd.model.weights.linear`."""

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """silu(gate) * up, of one linear that holds both, one after the other."""

    def add_norm(self, x: Tensor | Sums, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
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


class TorchBackend:
    """Plain PyTorch."""

    def __init__(self, arch: Architecture, layers: Sequence[int], cache: KVCache, tp: int = 1) -> None:
        """`layers` are the stage's, `tp` the number of tensor-parallel ranks."""
        self.cache = cache
        self.heads = [arch.num_heads // tp, cache.kv_heads, cache.kv_heads]
        self.head_dim = arch.head_dim
        self.windows = [arch.windows[layer] for layer in layers]
        self.rotary = Rotary(arch.rope, arch.head_dim, cache.keys.device)

    def prepare(self, batch: Batch) -> None:
        pass

    def begin(self, batch: Batch) -> None:
        self.plan = AttentionPlan(batch, self.cache, self.heads[0], self.windows)
        self.rope = self.rotary.tables(batch.positions, self.cache.keys.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.gated(linear(x, weight, bias))

    def add_norm(self, x: Tensor | Sums, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        if residual is not None:
            x = landed(x, len(residual)) + residual
        assert isinstance(x, Tensor)
        return norm(x), x

    def attend(self, layer: int, qkv: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).split(self.heads, dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return self.plan(layer, self.windows[layer], rotate(q, *self.rope), rotate(k, *self.rope), v)

    def gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
