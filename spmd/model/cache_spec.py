"""What a token leaves behind in the cache, layer by layer: the one place that knows how many bytes that takes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheSpec:
    """Of one layer on one rank: a key and a value for each of the rank's KV heads. See `Architecture.cache_spec`."""

    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize


def block_bytes(specs: Iterable[CacheSpec], block_size: int) -> int:
    """Bytes that a block of `block_size` tokens takes in all of these layers."""
    return block_size * sum(spec.token_bytes for spec in specs)
