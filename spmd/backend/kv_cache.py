"""The paged KV cache of one rank: keys and values of the layers its stage owns, for its share of the KV heads.

A layer's keys are `[num_blocks, kv_heads, block_size, head_dim]` (FlashInfer's HND layout): the tokens of one block and
head lie together, so that gathering a request's blocks yields `[kv_heads, tokens, head_dim]` by plain memory copies of
whole rows, ready for matrix products. Block 0 is the null block: padding writes there and nothing real reads it.

What stands in a block behind a request's last token is read, though it counts as nothing: it must be a number, since
a masked NaN would still poison a product. Who had the block before may have left NaN; `spmd.schedule.scheduler` says
what is done about that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spmd.model.cache_spec import CacheSpec
from spmd.parallel.transfer import to_device


class KVCache:
    """Keys and values, allocated once, as zeros."""

    def __init__(
        self, specs: Sequence[CacheSpec], num_blocks: int, block_size: int, device: torch.device | str = "cpu"
    ) -> None:
        """`specs` are those of the stage's layers, which must be alike."""
        (self.spec,) = set(specs)
        spec = self.spec
        self.block_size = block_size
        self.kv_heads, self.head_dim, self.dtype = spec.kv_heads, spec.head_dim, spec.dtype
        self.device = torch.device(device)
        shape = (len(specs), num_blocks, spec.kv_heads, block_size, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=spec.dtype, device=device)
        self.values = torch.zeros(shape, dtype=spec.dtype, device=device)
        self.heads = torch.arange(self.kv_heads, device=device)

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros, in all layers, behind the forwards that were launched before."""
        index = to_device(blocks, torch.int64, self.device)
        for cache in (self.keys, self.values):
            cache.index_fill_(1, index, 0)

    def write_index(self, slots: Tensor) -> Tensor:
        """Where `write` puts tokens, one row of `head_dim` a token and head: int64 `[T * kv_heads]` of slots `[T]`."""
        block, offset = slots[:, None] // self.block_size, slots[:, None] % self.block_size
        return ((block * self.kv_heads + self.heads) * self.block_size + offset).flatten()

    def write(self, layer: int, index: Tensor, k: Tensor, v: Tensor) -> None:
        """Store `k` and `v` `[T, kv_heads, head_dim]`; `layer` counts the stage's own layers from 0."""
        for cache, new in ((self.keys, k), (self.values, v)):
            cache[layer].view(-1, self.head_dim).index_copy_(0, index, new.reshape(-1, self.head_dim))
