"""Blocks of the KV cache side by side, ready for matrix products.

They are copied into buffers that are made once: fresh memory would cost more in page faults than the copy itself, and
a CUDA graph reads and writes at the same addresses for ever. How much is copied at once is bounded, so the buffers'
size is known before a start.
"""

import torch
from torch import Tensor

from spmd.backend.kv_cache import KVCache
from spmd.integers import ceil_div
from spmd.model.cache_spec import CacheSpec

# Keys and values of a layer that are copied at once, unless one request has more: on CPUs what their own caches hold
# until it is used, on GPUs enough to be worth the launches.
GATHER_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}


def gathered_blocks(spec: CacheSpec, block_size: int, kind: str) -> int:
    """Blocks of one layer that are copied at once on a kind of device, unless one request has more."""
    return GATHER_BYTES[kind] // (block_size * spec.token_bytes)


def buffer_blocks(spec: CacheSpec, block_size: int, kind: str, longest: int) -> int:
    """Blocks that the buffers hold, where the longest request has `longest` tokens."""
    return max(gathered_blocks(spec, block_size, kind), ceil_div(longest, block_size))


class BlockGather:
    """Reads one KV cache, a layer at a time."""

    def __init__(self, cache: KVCache, longest: int) -> None:
        """`longest`: tokens of the longest request."""
        self.cache = cache
        kind = cache.device.type
        self.blocks = gathered_blocks(cache.spec, cache.block_size, kind)  # to read at once
        held = buffer_blocks(cache.spec, cache.block_size, kind, longest)
        shape = held * cache.kv_heads, cache.block_size * cache.head_dim
        self.buffers = [cache.keys.new_empty(shape), cache.values.new_empty(shape)]

    def index(self, tables: Tensor) -> Tensor:
        """Where `read` finds blocks, one row a block and head: int64 `[R * kv_heads * width]` for `[R, width]`."""
        return (tables[:, None, :] * self.cache.kv_heads + self.cache.heads[:, None]).flatten()

    def read(self, layer: int, index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[rows * kv_heads, width * block_size, head_dim]` of `rows` tables, until the next read.

        No more blocks in all than `buffer_blocks`. `layer` counts the stage's own layers from 0.
        """
        cache, found = self.cache, []
        for source, buffer in zip((cache.keys[layer], cache.values[layer]), self.buffers, strict=True):
            read = torch.index_select(source.view(-1, buffer.shape[1]), 0, index, out=buffer[: len(index)])
            found.append(read.view(rows * cache.kv_heads, -1, cache.head_dim))
        keys, values = found
        return keys, values
