"""The backend for GPUs: attention by FlashInfer, what stands between attention and products by kernels of ours.

Decode rows go through XQA, or FlashAttention 2 where there are many (`WideDecode`). Both read block tables and lengths
on the device: nothing about them is known to the host, so CUDA graphs can hold them. Prompt chunks go through a kernel
that the host plans for (which thread block reads which part of the cache); FlashInfer picks FlashAttention 3 where the
chip has it.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from spmd.backend.cuda.decode_gemm import Products
from spmd.backend.kv_cache import KVCache
from spmd.integers import ceil_div
from spmd.model.architecture import Architecture
from spmd.model.batch import Batch, Span
from spmd.model.norm import RMSNorm
from spmd.model.rope import Rotary
from spmd.model.weights import linear
from spmd.parallel.peer_memory import PendingSums

WORKSPACE_BYTES = 384 * 2**20  # partial results of attention over split key ranges
WIDE = 256  # rows times KV heads from which on FlashAttention 2 is no slower than XQA: one wave of thread blocks
HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
CAPABILITY = (9, 0)  # XQA: Hopper and later


def why_not(arch: Architecture, block_size: int, device: torch.device) -> str | None:
    """What keeps this backend from running a model on a device; None if nothing does."""
    if device.type != "cuda":
        return f"it needs a GPU, the device is {device.type}"
    here = torch.cuda.is_available()  # else GPUs of another machine are planned for, which are taken to be capable
    if here and (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"it needs compute capability {CAPABILITY}, the device has {capability}"
    if arch.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, the model is {arch.dtype}"
    if arch.head_dim not in HEAD_DIMS:
        return f"it takes heads of {HEAD_DIMS} dimensions, the model's have {arch.head_dim}"
    if block_size not in BLOCK_SIZES:
        return f"it takes blocks of {BLOCK_SIZES} tokens, scheduler.block_size is {block_size}"
    if here and not find_spec("flashinfer"):
        return f"flashinfer is not installed: {sys.executable} -m pip install flashinfer-python"
    return None


class FlashInferBackend:
    """See `spmd.model.backend.Backend`."""

    def __init__(
        self,
        arch: Architecture,
        layers: Sequence[int],
        cache: KVCache,
        tp: int = 1,
        products: Products | None = None,
        decode_buckets: Sequence[int] = (),
        most_blocks: int = 0,
    ) -> None:
        """
        Args:
            layers: the stage's.
            tp: number of tensor-parallel ranks.
            products: do the products of decode batches.
            decode_buckets: row counts that many decode batches have.
            most_blocks: those of the longest request.
        """
        from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        self.cache = cache
        self.products = products
        self.heads = arch.num_heads // tp
        self.head_dim = arch.head_dim
        self.windows = [arch.windows[layer] for layer in layers]
        self.rotary = Rotary(arch.rope, arch.head_dim, self.device)
        self.decode_scratch = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        scratch = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self.prefill: dict[int | None, Any] = {
            window: BatchPrefillWithPagedKVCacheWrapper(scratch, "HND") for window in set(self.windows)
        }
        self.planned = torch.cuda.Event()
        self.wide = {
            rows: WideDecode(rows, self.heads, cache, most_blocks, scratch)
            for rows in decode_buckets
            if rows * cache.kv_heads >= WIDE
        }

    @property
    def device(self) -> torch.device:
        return self.cache.keys.device

    def prepare(self, batch: Batch) -> None:
        if not batch.prefills:
            return
        self.planned.synchronize()  # FlashInfer's pinned memory is free once the last plan was copied
        size, spans = self.cache.block_size, batch.prefills
        starts = self._pinned([0, *accumulate(span.count for span in spans)])
        ends = self._pinned([0, *accumulate(self._blocks(span) for span in spans)])
        last_lens = self._pinned([(span.kv_len - 1) % size + 1 for span in spans])
        blocks = torch.cat([batch.tables[span.seat, : self._blocks(span)] for span in spans])
        for window, wrapper in self.prefill.items():
            wrapper.plan(
                starts,
                ends,
                blocks,
                last_lens,
                self.heads,
                self.cache.kv_heads,
                self.head_dim,
                size,
                causal=True,
                window_left=-1 if window is None else window - 1,
                q_data_type=self.cache.keys.dtype,
                kv_data_type=self.cache.keys.dtype,
            )
        self.planned.record()

    def begin(self, batch: Batch) -> None:
        rows = batch.num_decodes
        self.batch = batch
        self.cos, self.sin = self.rotary.angles(batch.positions)
        self.slots = batch.slots(self.cache.block_size)
        if rows in self.wide:
            self.wide[rows].fill(batch)
        self.decode_tables = batch.tables[batch.seats[:rows]]
        self.decode_lens = (batch.positions[:rows] + 1).to(torch.uint32)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = self._product(x, weight, bias, 1)
        return linear(x, weight, bias) if product is None else product

    def gated_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        product = self._product(x, weight, bias, 2)
        return self.gated(linear(x, weight, bias)) if product is None else product

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, halves: int) -> Tensor | None:
        """By our own kernel, if that can do it."""
        if self.products is None or bias is not None or self.batch.prefills:
            return None
        return self.products(x, weight, halves)

    def add_norm(self, x: Tensor | PendingSums, residual: Tensor | None, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        from spmd.backend.cuda import exchange_kernels, layer_kernels

        if isinstance(x, PendingSums):
            assert residual is not None
            return exchange_kernels.add_norm(x, residual, norm.weight, norm.eps)
        return layer_kernels.add_norm(x, residual, norm.weight, norm.eps)

    def attend(self, layer: int, qkv: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        from spmd.backend.cuda.layer_kernels import norm_rope_append

        keys, values, window = self.cache.keys[layer], self.cache.values[layer], self.windows[layer]
        norms = (q_norm.weight, k_norm.weight) if q_norm and k_norm else None
        eps = q_norm.eps if q_norm else 0.0
        q = norm_rope_append(qkv, norms, eps, self.cos, self.sin, self.slots, keys, values)
        output, rows = torch.empty_like(q), self.batch.num_decodes
        if rows:
            self._decode(q[:rows], keys, values, window, output[:rows])
        if self.batch.prefills:
            self.prefill[window].run(q[rows:], (keys, values), out=output[rows:])
        return output.flatten(1)

    def gated(self, gate_up: Tensor) -> Tensor:
        from spmd.backend.cuda.layer_kernels import gated

        return gated(gate_up)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, output: Tensor) -> None:
        if window is None and len(q) in self.wide:
            self.wide[len(q)](q, keys, values, output)
            return
        from flashinfer.decode import xqa_batch_decode_with_kv_cache

        xqa_batch_decode_with_kv_cache(
            q,
            (keys, values),
            self.decode_scratch,
            self.decode_tables,
            self.decode_lens,
            self.decode_tables.shape[1] * self.cache.block_size,
            bmm1_scale=self.head_dim**-0.5,
            window_left=-1 if window is None else window - 1,
            out=output,
            kv_layout="HND",
        )

    def _blocks(self, span: Span) -> int:
        return ceil_div(span.kv_len, self.cache.block_size)

    @staticmethod
    def _pinned(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, pin_memory=True)


class WideDecode:
    """For `rows` rows exactly."""

    def __init__(self, rows: int, heads: int, cache: KVCache, most_blocks: int, scratch: Tensor) -> None:
        """`heads` are this rank's query heads, `most_blocks` those of the longest request."""
        from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper

        device, self.size = cache.keys.device, cache.block_size
        self.ends = torch.arange(rows + 1, dtype=torch.int32, device=device) * most_blocks
        self.last = torch.full((rows,), self.size, dtype=torch.int32, device=device)
        self.blocks = torch.zeros(rows * most_blocks, dtype=torch.int32, device=device)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=True)
        self.wrapper.plan(  # keeps these tensors, which `fill` writes
            *(self.ends, self.blocks, self.last, heads, cache.kv_heads, cache.keys.shape[-1], self.size),
            q_data_type=cache.keys.dtype,
            kv_data_type=cache.keys.dtype,
            disable_split_kv=True,
        )

    def fill(self, batch: Batch) -> None:
        """Take the lengths and tables of the batch's decode rows."""
        from spmd.backend.cuda.layer_kernels import pack_tables

        pack_tables(batch.positions, batch.seats, batch.tables, self.ends, self.last, self.blocks, self.size)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """`[rows, heads, head_dim]` against one layer's cache."""
        self.wrapper.run(q, (keys, values), out=output, enable_pdl=True)
