"""What one forward needs besides the token ids or hidden states: positions, seats, and the block tables."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A chunk of one prompt: rows `start .. start + count` of the batch, the last `count` of `kv_len` tokens."""

    start: int
    count: int
    kv_len: int
    seat: int


@dataclass(frozen=True)
class Batch:
    """T rows, one token each: first the decode rows (padding included), then the prompt chunks.

    A request's blocks are the row of `tables` that it sits in. Padding rows sit in a row of null blocks 0, at
    position 0.
    """

    positions: Tensor  # int64 [T]
    seats: Tensor  # int64 [T]
    tables: Tensor  # int32 [seats, blocks of the longest request]: block ids
    widths: list[int]  # [R]: blocks that each decode row may have, at least as many as it has
    prefills: list[Span]
    sample_rows: Tensor | None  # int64 [S]: rows whose logits are wanted; None: all
    shared_rows: int | None = None  # rows that every replica has in this tick's sparse layers, padding included

    @property
    def num_decodes(self) -> int:
        """R."""
        return len(self.widths)

    def slots(self, block_size: int) -> Tensor:
        """int64 [T]: each token's place in the KV cache, `block * block_size + offset`."""
        return self.tables[self.seats, self.positions // block_size] * block_size + self.positions % block_size
