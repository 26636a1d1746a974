"""Attention over the paged cache by FlashInfer's kernels.

Decode rows go through XQA, or FlashAttention 2 where there are many (`WideDecode`). Both read block tables and lengths
on the device: nothing about them is known to the host, so CUDA graphs can hold them. Prompt chunks go through a kernel
that the host plans for (which thread block reads which part of the cache); FlashInfer picks FlashAttention 3 where the
chip has it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper, xqa_batch_decode_with_kv_cache
from flashinfer.prefill import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from spmd.backend.cuda.layer_kernels import pack_tables
from spmd.backend.cuda.limits import WORKSPACE_BYTES
from spmd.backend.kv_cache import KVCache
from spmd.integers import ceil_div
from spmd.model.batch import Batch, Span

# Decode rows times KV heads from which on FlashAttention 2 is no slower than XQA: one wave of thread blocks.
MIN_WIDE_ROWS_TIMES_HEADS = 256


class FlashInferAttention:
    """How the rows of a batch attend to the cache, which holds their own keys and values already."""

    def __init__(
        self, cache: KVCache, heads: int, windows: set[int | None], decode_buckets: Sequence[int], most_blocks: int
    ) -> None:
        """
        Args:
            heads: this rank's query heads.
            windows: that layers have.
            decode_buckets: row counts that many decode batches have.
            most_blocks: those of the longest request.
        """
        self.cache = cache
        self.heads = heads
        self.decode_scratch = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        scratch = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        self.prefill: dict[int | None, Any] = {
            window: BatchPrefillWithPagedKVCacheWrapper(scratch, "HND") for window in windows
        }
        self.planned = torch.cuda.Event()
        self.wide = {
            rows: WideDecode(rows, heads, cache, most_blocks, scratch)
            for rows in decode_buckets
            if rows * cache.kv_heads >= MIN_WIDE_ROWS_TIMES_HEADS
        }

    def prepare(self, batch: Batch) -> None:
        """Plan for the prompt chunks, on the host."""
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
                *(starts, ends, blocks, last_lens, self.heads, self.cache.kv_heads, self.cache.head_dim, size),
                causal=True,
                window_left=_left(window),
                q_data_type=self.cache.dtype,
                kv_data_type=self.cache.dtype,
            )
        self.planned.record()

    def begin(self, batch: Batch) -> None:
        """What all layers' decodes share, on the device."""
        rows = batch.num_decodes
        self.batch = batch
        self.end = rows + sum(span.count for span in batch.prefills)  # padding stands behind it
        if rows in self.wide:
            self.wide[rows].fill(batch)
        self.decode_tables = batch.tables[batch.seats[:rows]]
        self.decode_lens = (batch.positions[:rows] + 1).to(torch.uint32)

    def __call__(self, layer: int, queries: Tensor, window: int | None, output: Tensor | None = None) -> Tensor:
        """Queries `[T, heads, head_dim]` to `[T, heads * head_dim]`.

        `output`: where to put it, as queries are; rows behind those of the batch stay as they are.
        """
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        output, rows = torch.empty_like(queries) if output is None else output, self.batch.num_decodes
        if rows:
            self._decode(queries[:rows], keys, values, window, output[:rows])
        if self.batch.prefills:
            self.prefill[window].run(queries[rows : self.end], (keys, values), out=output[rows : self.end])
        return output.flatten(1)

    def _decode(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None, output: Tensor) -> None:
        if window is None and len(q) in self.wide:
            self.wide[len(q)](q, keys, values, output)
            return
        xqa_batch_decode_with_kv_cache(
            q,
            (keys, values),
            self.decode_scratch,
            self.decode_tables,
            self.decode_lens,
            self.decode_tables.shape[1] * self.cache.block_size,
            bmm1_scale=self.cache.head_dim**-0.5,
            window_left=_left(window),
            out=output,
            kv_layout="HND",
        )

    def _blocks(self, span: Span) -> int:
        return ceil_div(span.kv_len, self.cache.block_size)

    @staticmethod
    def _pinned(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, pin_memory=True)


class WideDecode:
    """FlashAttention 2 for decode batches of exactly `rows` rows, of any lengths, without the host's planning for each.

    FlashInfer plans from the lengths which thread block reads what. Told not to split a row's tokens over blocks
    (`disable_split_kv`), its plan comes to one block for each row and KV head, whatever the lengths are. So one plan is
    made here, for rows of `most_blocks` blocks each. The kernel reads the rows' real lengths and block tables from
    three tensors that the wrapper keeps: `ends`, `last` and `blocks`. `fill`, a kernel at the start of each forward,
    writes them; the attention of all its layers, launched behind it, reads them; the next forward's `fill` is launched
    behind those. All run on one stream, so each finds what it should, in a CUDA graph too.
    """

    def __init__(self, rows: int, heads: int, cache: KVCache, most_blocks: int, scratch: Tensor) -> None:
        """`heads` are this rank's query heads, `most_blocks` those of the longest request."""
        device, self.size = cache.device, cache.block_size
        self.ends = torch.arange(rows + 1, dtype=torch.int32, device=device) * most_blocks
        self.last = torch.full((rows,), self.size, dtype=torch.int32, device=device)
        self.blocks = torch.zeros(rows * most_blocks, dtype=torch.int32, device=device)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(scratch, "HND", use_tensor_cores=True)
        self.wrapper.plan(  # keeps these tensors, which `fill` writes
            *(self.ends, self.blocks, self.last, heads, cache.kv_heads, cache.head_dim, self.size),
            q_data_type=cache.dtype,
            kv_data_type=cache.dtype,
            disable_split_kv=True,
        )

    def fill(self, batch: Batch) -> None:
        """Take the lengths and tables of the batch's decode rows."""
        pack_tables(batch.positions, batch.seats, batch.tables, self.ends, self.last, self.blocks, self.size)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """`[rows, heads, head_dim]` against one layer's cache."""
        self.wrapper.run(q, (keys, values), out=output, enable_pdl=True)


def _left(window: int | None) -> int:
    """FlashInfer's number for a window: tokens to the left of the query, -1 for all."""
    return -1 if window is None else window - 1
