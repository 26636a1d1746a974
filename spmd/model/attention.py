"""Attention of one layer: projections around what a kind of attention does with them."""

from torch import Tensor, nn

from spmd.model.architecture import Architecture, GroupedQuery
from spmd.model.backend import Backend
from spmd.model.layers import ColumnLinear, RMSNorm, RowLinear
from spmd.parallel.tensor import TensorParallel


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; each tensor-parallel rank has its share of the heads."""

    def __init__(self, arch: Architecture, kind: GroupedQuery, tp: TensorParallel) -> None:
        super().__init__()
        q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.window = kind.window
        self.eps = arch.rms_norm_eps
        self.qkv_proj = ColumnLinear(arch, arch.hidden_size, parts, arch.qkv_bias, tp)
        self.o_proj = RowLinear(arch, q, arch.hidden_size, arch.o_bias, tp)
        self.q_norm = RMSNorm(arch.head_dim, arch) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch) if arch.qk_norm else None

    def forward(self, x: Tensor, layer: int, backend: Backend) -> Tensor:
        """`[T, hidden]` both; `layer` counts the stage's own layers from 0."""
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm and self.k_norm else None
        queries = backend.append(layer, self.qkv_proj(x, backend), norms, self.eps)
        attended: Tensor = self.o_proj(backend.attend(layer, queries, self.window), backend)
        return attended
