"""What one forward needs besides the token ids or hidden states: positions, cache slots and block tables."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A chunk of one prompt: rows `start .. start + count` of the batch, the last `count` of `kv_len` tokens."""

    start: int
    count: int
    kv_len: int
    table: Tensor  # int64 [ceil(kv_len / block_size)]: block ids


@dataclass(frozen=True)
class Batch:
    """T rows, one token each: first the decode rows (padding included), then the prompt chunks.

    A slot is a token's place in the KV cache, `block * block_size + offset`. Padding rows point into the null block
    0, with length 1.
    """

    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]
    sample_rows: Tensor  # int64 [S]: rows whose logits are wanted
    num_decodes: int  # R
    decode_tables: Tensor  # int64 [R, width]: block ids
    decode_lens: Tensor  # int64 [R]: tokens of each row in the cache, the new one included
    prefills: list[Span]
