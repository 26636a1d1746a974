"""Attention of decode batches of many rows: FlashInfer's FlashAttention 2, planned once for a number of rows.

With more rows than a plan would split, it is one thread block a row and KV head, whatever the lengths are: those and
the block tables are read on the device, so CUDA graphs can hold it. Two such blocks share a multiprocessor, where one
of XQA's fills it: one loads while the other starts or ends, which ragged lengths need.
"""

import torch
from torch import Tensor

from spmd.model.batch import Batch
from spmd.model.kv_cache import KVCache


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
        from spmd.model.kernels import pack_tables

        pack_tables(batch.positions, batch.seats, batch.tables, self.ends, self.last, self.blocks, self.size)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, output: Tensor) -> None:
        """`[rows, heads, head_dim]` against one layer's cache."""
        self.wrapper.run(q, (keys, values), out=output, enable_pdl=True)
