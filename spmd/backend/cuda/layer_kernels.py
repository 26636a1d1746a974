"""Triton kernels for what stands between products and attention: add and norm; norm, rotation, append; activation.

No library has the second in one piece: it would take four launches a layer; at 36 layers and 2 microseconds each,
0.2 ms a tick. The others could be FlashInfer's, but those keep the product behind them from starting before they end.

These start while the kernel in front still runs, and let the one behind do so (programmatic dependent launch). So each
waits, for all kernels in front of it to end, before it touches what they write or read, and whatever is launched early
behind it must do so too.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_GATED_COLUMNS = 2048  # of a thread block
MIN_GROUPED_ROWS = 4096  # from here on a thread block takes four, if they are narrow: its start costs more than one's


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMS norm of `x + residual` and the sum, `[T, hidden]` both, in the places of x and the residual.

    Without a residual, of x alone, which stays as it is and stands for the sum. All contiguous.
    """
    rows, size = x.shape
    normed, total = (torch.empty_like(x), x) if residual is None else (x, residual)
    if rows:
        _add_norm[(rows,)](
            x, total, normed, weight, eps, size, triton.next_power_of_2(size), residual is not None, x.is_cuda,
            num_warps=8, **launch(x),
        )  # fmt: skip
    return normed, total


def gated(gate_up: Tensor, known: Tensor | None = None) -> Tensor:
    """silu(gate) * up of `[T, 2 * inner]`, contiguous; only of the first `known` rows (int32 `[1]`), if it is given."""
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, inner)
    if rows:
        at_once = min(MAX_GATED_COLUMNS, triton.next_power_of_2(inner))
        group = 4 if rows >= MIN_GROUPED_ROWS and at_once < MAX_GATED_COLUMNS else 1
        _gated[(triton.cdiv(rows, group), triton.cdiv(inner, at_once))](
            gate_up, out, known, rows, inner, at_once, group, known is not None, gate_up.is_cuda,
            num_warps=max(1, at_once // 256), **launch(gate_up),
        )  # fmt: skip
    return out


def norm_rope_append(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm and rotate queries and keys, store keys and values in the cache, return the queries.

    Args:
        qkv: `[T, (heads + 2 * kv_heads) * head_dim]`, contiguous; head_dim a power of two.
        norms: weights `[head_dim]` of the RMS norms of queries and keys, if there are any.
        cos, sin: float32 `[T, head_dim // 2]`.
        slots: int64 `[T]`, places in the cache.
        keys, values: one layer's cache, `[blocks, kv_heads, block_size, head_dim]`.

    Returns:
        `[T, heads, head_dim]`.
    """
    _, kv_heads, block_size, head_dim = keys.shape
    rows, heads = len(qkv), qkv.shape[1] // head_dim - 2 * kv_heads
    queries = torch.empty(rows, heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if rows == 0:
        return queries
    at_once = next(n for n in (8, 4, 2, 1) if heads % n == 0 and kv_heads % n == 0)
    q_weight, k_weight = norms or (qkv, qkv)
    _norm_rope_append[(rows, (heads + 2 * kv_heads) // at_once)](
        qkv, q_weight, k_weight, cos, sin, slots, queries, keys, values,
        eps, heads, kv_heads, head_dim, block_size, at_once, norms is not None, qkv.is_cuda,
        num_warps=max(1, at_once // 2), **launch(qkv),
    )  # fmt: skip
    return queries


def pack_tables(
    positions: Tensor, seats: Tensor, tables: Tensor, ends: Tensor, last: Tensor, blocks: Tensor, block_size: int
) -> None:
    """Block tables of rows one after the other, without what a row doesn't use.

    Args:
        positions, seats: int64, of at least R rows.
        tables: int32 `[seats, blocks of the longest request]`.
        ends: int32 `[R + 1]`, of which the first is 0; the others become where each row's blocks end.
        last: int32 `[R]`, becomes the tokens in each row's last block.
        blocks: int32, becomes the blocks.
    """
    rows, width = len(last), tables.shape[1]
    _pack_tables[(rows,)](
        positions, seats, tables, ends, last, blocks, width, block_size, triton.next_power_of_2(rows), num_warps=4
    )


def launch(x: Tensor) -> dict[str, Any]:
    """How to start early; Triton's interpreter knows nothing of that."""
    return {"launch_pdl": True} if x.is_cuda else {}


@triton.jit
def wait(early: tl.constexpr):
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _add_norm(
    x, total, normed, weight, eps,
    size: tl.constexpr, width: tl.constexpr, added: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, width)
    inside = column < size
    at = tl.program_id(0).to(tl.int64) * size + column
    wait(early)
    row = tl.load(x + at, inside, 0).to(tl.float32)
    if added:
        row += tl.load(total + at, inside, 0).to(tl.float32)
        tl.store(total + at, row, inside)
    scale = tl.rsqrt(tl.sum(row * row) / size + eps)
    tl.store(normed + at, row * scale * tl.load(weight + column, inside, 0).to(tl.float32), inside)


@triton.jit
def _gated(
    gate_up, out, known, rows,
    inner: tl.constexpr, at_once: tl.constexpr, group: tl.constexpr, limited: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * group + tl.arange(0, group)[:, None]
    column = tl.program_id(1) * at_once + tl.arange(0, at_once)[None, :]
    source = gate_up + row * 2 * inner + column
    wait(early)
    if limited:
        rows = tl.minimum(rows, tl.load(known))
    inside = (row < rows) & (column < inner)
    gate, up = tl.load(source, inside, 0).to(tl.float32), tl.load(source + inner, inside, 0).to(tl.float32)
    tl.store(out + row * inner + column, gate / (1 + tl.exp(-gate)) * up, inside)


@triton.jit
def _pack_tables(
    positions, seats, tables, ends, last, blocks,
    width, block_size: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    each = tl.arange(0, at_once)
    before = tl.load(positions + each, each < row, 0).to(tl.int32) // block_size + 1
    start = tl.sum(tl.where(each < row, before, 0))
    position = tl.load(positions + row).to(tl.int32)
    count = position // block_size + 1
    tl.store(ends + row + 1, start + count)
    tl.store(last + row, position % block_size + 1)
    table = tables + tl.load(seats + row) * width
    for first in range(0, count, at_once):
        column = first + each
        tl.store(blocks + start + column, tl.load(table + column, column < count, 0), column < count)


@triton.jit
def _norm_rope_append(
    qkv, q_weight, k_weight, cos, sin, slots, queries, keys, values,
    eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, block_size: tl.constexpr,
    at_once: tl.constexpr, normed: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    wait(early)
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * at_once
    head = first + tl.arange(0, at_once)[:, None]
    half: tl.constexpr = head_dim // 2
    column = tl.arange(0, half)[None, :]
    source = qkv + (row * (heads + 2 * kv_heads) + head) * head_dim + column
    low, high = tl.load(source), tl.load(source + half)
    if first < heads + kv_heads:
        dtype = low.dtype
        low, high = low.to(tl.float32), high.to(tl.float32)
        if normed:
            scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1))[:, None] / head_dim + eps)
            if first < heads:  # noqa: SIM108  # Triton's compiler decides by blocks
                weight = q_weight
            else:
                weight = k_weight
            low = low * scale * tl.load(weight + column).to(tl.float32)
            high = high * scale * tl.load(weight + half + column).to(tl.float32)
        c, s = tl.load(cos + row * half + column), tl.load(sin + row * half + column)
        rotated = low * c - high * s
        high = (high * c + low * s).to(dtype)
        low = rotated.to(dtype)
    if first < heads:
        target = queries + (row * heads + head) * head_dim + column
    else:
        slot = tl.load(slots + row)
        kv_head = (head - heads) % kv_heads
        place = ((slot // block_size) * kv_heads + kv_head) * block_size + slot % block_size
        if first < heads + kv_heads:  # noqa: SIM108
            target = keys + place * head_dim + column
        else:
            target = values + place * head_dim + column
    tl.store(target, low)
    tl.store(target + half, high)
