"""Attention of the decode rows of a batch in plain PyTorch: rows of like length at once.

The rows of a group are read as if each had as many blocks as the widest, because the products want one shape. So a
long row is read apart from short ones, and a group has no more blocks than are to be read at once. Rows are cut into
groups on the host, once for all layers. A CUDA graph is captured with all rows as wide as the longest request, and so
in groups that fit every batch; nothing is uploaded then, since the rows stay in their order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.gather import BlockGather
from spmd.backend.plain.scaled_dot_product import attend, causal_mask
from spmd.model.batch import Batch
from spmd.parallel.transfer import to_device

WORTH = 16  # the launches of another group take about as long as reading one part in so many of what is read at once


def cut(widths: Sequence[int], most: int, worth: int) -> list[slice]:
    """Groups of rows whose blocks, `widths`, are in descending order.

    A group ends before a row that has less than half of its first one's, if the rows from there on would be padded by
    more than `worth` blocks, and where it would have more than `most`, padding included, unless it is one row.
    """
    groups, start = [], 0
    for row, width in enumerate(widths):
        widest = widths[start]
        narrow = 2 * width < widest and (len(widths) - row) * (widest - width) > worth
        if row > start and (narrow or (row + 1 - start) * widest > most):
            groups.append(slice(start, row))
            start = row
    return [*groups, slice(start, len(widths))]


@dataclass(frozen=True)
class Group:
    """Rows that are read at once."""

    rows: slice  # of the decode rows in the plan's order
    index: Tensor  # of their blocks, see `BlockGather.index`
    masks: dict[int | None, Tensor]  # by window: [rows * kv_heads, 1, tokens], 0 or -inf


class DecodePlan:
    """How the decode rows of one batch, of which there are some, attend."""

    def __init__(self, batch: Batch, gather: BlockGather, group: int, windows: Iterable[int | None]) -> None:
        """`group`: query heads that share a KV head; `windows`: the sliding windows of the layers that will call."""
        self.gather = gather
        self.group = group
        self.order: Tensor | None = None  # of the batch's rows here; None: as they are there
        cache, rows = gather.cache, batch.num_decodes
        seats, positions = batch.seats[:rows], batch.positions[:rows]
        order = sorted(range(rows), key=lambda row: -batch.widths[row])
        widths = [batch.widths[row] for row in order]
        cuts = cut(widths, gather.blocks, gather.blocks // WORTH)
        if len(cuts) > 1 and order != [*range(rows)]:
            self.order = to_device(order, torch.int64, cache.device)
            self.back = self.order.argsort()
            seats, positions = seats[self.order], positions[self.order]
        self.groups = []
        for part in cuts:
            tables = batch.tables[seats[part], : widths[part.start]]
            masks = {window: _mask(cache, positions[part], tables.shape[1], window) for window in windows}
            self.groups.append(Group(part, gather.index(_own(tables, positions[part] // cache.block_size)), masks))

    def attend(self, layer: int, window: int | None, q: Tensor) -> Tensor:
        """`[R, heads * head_dim]` for queries `[R, heads, head_dim]`; `layer` counts the stage's own from 0."""
        if self.order is not None:
            q = q[self.order]
        parts = [self._attend_group(layer, window, q[group.rows], group) for group in self.groups]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if self.order is None else out[self.back]

    def _attend_group(self, layer: int, window: int | None, q: Tensor, group: Group) -> Tensor:
        rows, _, head_dim = q.shape
        keys, values = self.gather.read(layer, group.index, rows)
        return attend(q.reshape(-1, self.group, head_dim), keys, values, group.masks[window]).view(rows, -1)


def _own(tables: Tensor, last: Tensor) -> Tensor:
    """`[R, width]` tables with each row's first block again behind its `last` one: nobody else's are read."""
    behind = torch.arange(tables.shape[1], device=last.device) > last[:, None]
    return torch.where(behind, tables[:, :1], tables)


def _mask(cache: KVCache, positions: Tensor, width: int, window: int | None) -> Tensor:
    """`[R * kv_heads, 1, width * block_size]`, since the products take no broadcast over part of a batch."""
    tokens = torch.arange(width * cache.block_size, device=positions.device)
    mask = causal_mask(positions[:, None], tokens, window, cache.dtype)
    return mask.repeat_interleave(cache.kv_heads, dim=0).unsqueeze(1)
