"""The reference backend: plain PyTorch, on any device."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.attention import AttentionPlan
from spmd.model.architecture import Architecture
from spmd.model.backend import landed
from spmd.model.batch import Batch
from spmd.model.norm import RMSNorm
from spmd.model.rope import Rotary, rotate
from spmd.model.weights import linear
from spmd.parallel.peer_memory import PendingSums


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

    def add_norm(self, x: Tensor | PendingSums, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
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
