"""The reference backend: plain PyTorch for everything, on any device."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.attention import AttentionPlan
from spmd.backend.plain.experts import PlainExperts
from spmd.backend.plain.gather import BlockGather
from spmd.model.architecture import Architecture
from spmd.model.backend import Sums
from spmd.model.batch import Batch
from spmd.model.linear import Weight
from spmd.model.rope import Rotary, rotate

WIDEST_GRAPH = 2048  # tokens of a request; a graph reads as many for each row, however short it is


class PlainBackend:
    """See `spmd.model.backend.Backend`."""

    def __init__(
        self, arch: Architecture, layers: Sequence[int], cache: KVCache, tp: int = 1, longest: int = WIDEST_GRAPH
    ) -> None:
        """`layers`: the stage's; `tp`: number of tensor-parallel ranks; `longest`: tokens of the longest request."""
        self.cache = cache
        self.gather = BlockGather(cache, longest)
        self.heads = [arch.num_heads // tp, cache.kv_heads, cache.kv_heads]
        self.windows = {arch.windows[layer] for layer in layers}
        self.rotary = Rotary(arch.rope, arch.head_dim, cache.device)
        self.experts = PlainExperts(self.gated_linear)
        self.capturable = not arch.num_experts and longest <= WIDEST_GRAPH

    def prepare(self, batch: Batch) -> None:
        pass

    def begin(self, batch: Batch) -> None:
        self.plan = AttentionPlan(batch, self.gather, self.heads[0], self.windows)
        self.rope = self.rotary.tables(batch.positions, self.cache.dtype)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return weight.linear(x, bias, out)

    def gated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        gate, up = weight.linear(x, bias).chunk(2, dim=-1)
        return F.silu(gate) * up

    def add_norm(self, x: Sums, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert isinstance(x, Tensor)
        total = x if residual is None else x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total

    def append(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
        q, k, v = qkv.unflatten(1, (-1, self.cache.head_dim)).split(self.heads, dim=1)
        if norms:
            q, k = (F.rms_norm(x, weight.shape, weight, eps) for x, weight in zip((q, k), norms, strict=True))
        queries = rotate(q, *self.rope)
        self.plan.append(layer, rotate(k, *self.rope), v)
        return queries

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        return self.plan.attend(layer, window, queries)

    def collect(self, sums: Sums, rows: int) -> Tensor:
        assert isinstance(sums, Tensor)
        return sums
