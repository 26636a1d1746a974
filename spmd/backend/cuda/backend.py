"""The backend for NVIDIA GPUs: attention by FlashInfer, products by cuBLAS or ours, and our kernels between them."""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from spmd.backend.cuda import exchange_kernels, layer_kernels
from spmd.backend.cuda.decode_gemm import DecodeGemm
from spmd.backend.cuda.expert_kernels import experts
from spmd.backend.cuda.limits import capturable, runs_experts
from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.experts import PlainExperts
from spmd.model.architecture import Architecture
from spmd.model.backend import Sums
from spmd.model.batch import Batch
from spmd.model.linear import Dense, Weight
from spmd.model.rope import Rotary


class Attention(Protocol):
    """Of the rows of a batch to the cache: FlashInfer's, or what holds its place while graphs are captured."""

    heads: int  # this rank's query heads

    def prepare(self, batch: Batch) -> None: ...

    def begin(self, batch: Batch) -> None: ...

    def __call__(self, layer: int, queries: Tensor, window: int | None, output: Tensor | None = None) -> Tensor: ...


class CudaBackend:
    """See `spmd.model.backend.Backend`."""

    def __init__(
        self, arch: Architecture, cache: KVCache, attention: Attention, decode_gemm: DecodeGemm | None
    ) -> None:
        """`decode_gemm` does the products of decode batches, where it can."""
        self.cache = cache
        self.attention = attention
        self.decode_gemm = decode_gemm
        self.rotary = Rotary(arch.rope, arch.head_dim, cache.device)
        self.capturable = capturable(arch)
        self.experts = experts if runs_experts(arch) else PlainExperts(self.gated_linear)

    def prepare(self, batch: Batch) -> None:
        self.attention.prepare(batch)

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        self.cos, self.sin = self.rotary.angles(batch.positions)
        self.slots = batch.slots(self.cache.block_size)
        self.attention.begin(batch)

    def embedding(self, ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        product = self._decode_product(x, weight, bias, gated=False) if out is None else None
        return weight.linear(x, bias, out) if product is None else product

    def gated_linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        product = self._decode_product(x, weight, bias, gated=True)
        return layer_kernels.gated(weight.linear(x, bias)) if product is None else product

    def _decode_product(self, x: Tensor, weight: Weight, bias: Tensor | None, gated: bool) -> Tensor | None:
        """By our own kernel, if that can do it."""
        if self.decode_gemm is None or bias is not None or self.batch.prefills or not isinstance(weight, Dense):
            return None
        return self.decode_gemm(x, weight.values, gated)

    def add_norm(self, x: Sums, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor):
            return layer_kernels.add_norm(x, residual, weight, eps)
        assert isinstance(x, exchange_kernels.WordSums) and residual is not None
        return exchange_kernels.add_norm(x, residual, weight, eps)

    def append(self, layer: int, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        return layer_kernels.norm_rope_append(qkv, norms, eps, self.cos, self.sin, self.slots, keys, values)

    def attend(self, layer: int, queries: Tensor, window: int | None) -> Tensor:
        return self.attention(layer, queries, window)

    def collect(self, sums: Sums, rows: int) -> Tensor:
        if isinstance(sums, Tensor):
            return sums
        assert isinstance(sums, exchange_kernels.WordSums)
        return exchange_kernels.collect(sums, rows)
