"""Attention over the paged cache in plain PyTorch, for decode rows and prompt chunks of one batch.

A plan is made once per forward and holds what all layers share: gather indices and masks. Both kinds of work end in the
same batched products, with the query heads of one KV head folded into the query length, so that keys and values are
never expanded. On CPUs these products are two to four times faster than `scaled_dot_product_attention`, measured in
bf16 for 8 decode rows of 160 tokens and for prompts of 64 to 512.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spmd.backend.plain.decode import DecodePlan
from spmd.backend.plain.gather import BlockGather
from spmd.backend.plain.scaled_dot_product import attend, causal_mask
from spmd.integers import ceil_div
from spmd.model.batch import Batch, Span

QUERY_TILE = 256  # queries of a prompt chunk handled at once: bounds the memory of the scores


@dataclass(frozen=True)
class Tile:
    """Queries `rows` of a span against the tokens `keys` that they may see."""

    rows: slice
    keys: slice
    mask: Tensor  # [group * rows, keys], 0 or -inf


class AttentionPlan:
    """How the rows of one batch attend: in each layer `append`, then `attend`."""

    def __init__(self, batch: Batch, gather: BlockGather, num_heads: int, windows: Iterable[int | None]) -> None:
        """`num_heads` are this rank's query heads, `windows` the sliding windows of the layers that will call."""
        self.batch = batch
        self.padding = len(batch.positions) - batch.num_decodes - sum(span.count for span in batch.prefills)
        self.gather = gather
        self.cache = cache = gather.cache
        self.group = num_heads // cache.kv_heads
        self.write_index = cache.write_index(batch.slots(cache.block_size))
        # A chunk that starts its prompt has its keys at hand and reads nothing from the cache.
        self.span_index = [
            gather.index(self._table(span)) if span.kv_len > span.count else None for span in batch.prefills
        ]
        distinct = set(windows)
        self.decodes = DecodePlan(batch, gather, self.group, distinct) if batch.num_decodes else None
        self.tiles = {window: [list(self._tiles(span, window)) for span in batch.prefills] for window in distinct}

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the new keys and values `[T, kv_heads, head_dim]`; `layer` counts the stage's own layers from 0."""
        self.cache.write(layer, self.write_index, k, v)
        self.appended = k, v

    def attend(self, layer: int, window: int | None, q: Tensor) -> Tensor:
        """`[T, heads * head_dim]` for queries `[T, heads, head_dim]`."""
        k, v = self.appended
        del self.appended  # the rest of the layer needs their memory
        parts = [self.decodes.attend(layer, window, q[: self.batch.num_decodes])] if self.decodes else []
        for span, index, tiles in zip(self.batch.prefills, self.span_index, self.tiles[window], strict=True):
            rows = slice(span.start, span.start + span.count)
            if index is None:
                keys, values = k[rows].transpose(0, 1).contiguous(), v[rows].transpose(0, 1).contiguous()
            else:
                keys, values = self.gather.read(layer, index, 1)
            parts += [self._attend_tile(q[rows], keys, values, tile) for tile in tiles]
        if self.padding:
            parts.append(q.new_zeros(self.padding, q[0].numel()))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_tile(self, q: Tensor, keys: Tensor, values: Tensor, tile: Tile) -> Tensor:
        kv_heads, head_dim = keys.shape[0], q.shape[-1]
        queries = q[tile.rows].unflatten(1, (kv_heads, self.group)).permute(1, 2, 0, 3)
        out = attend(queries.reshape(kv_heads, -1, head_dim), keys[:, tile.keys], values[:, tile.keys], tile.mask)
        return out.view(kv_heads, self.group, -1, head_dim).permute(2, 0, 1, 3).flatten(1)

    def _table(self, span: Span) -> Tensor:
        return self.batch.tables[span.seat, None, : ceil_div(span.kv_len, self.cache.block_size)]

    def _tiles(self, span: Span, window: int | None) -> Iterator[Tile]:
        first = span.kv_len - span.count
        device, dtype = self.cache.device, self.cache.dtype
        for start in range(0, span.count, QUERY_TILE):
            stop = min(start + QUERY_TILE, span.count)
            seen = slice(max(0, first + start + 1 - window) if window else 0, first + stop)
            queries = torch.arange(first + start, first + stop, device=device)[:, None]
            mask = causal_mask(queries, torch.arange(seen.start, seen.stop, device=device), window, dtype)
            yield Tile(slice(start, stop), seen, mask.repeat(self.group, 1))
