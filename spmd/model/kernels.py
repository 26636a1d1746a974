"""A Triton kernel for what no library has in one piece: norm and rotation of queries and keys, and cache append.

By library calls it takes four launches a layer; at 36 layers and 2 microseconds each, 0.2 ms a tick.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


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
        eps, heads, kv_heads, head_dim, block_size, at_once, norms is not None, num_warps=max(1, at_once // 2),
    )  # fmt: skip
    return queries


@triton.jit
def _norm_rope_append(
    qkv, q_weight, k_weight, cos, sin, slots, queries, keys, values,
    eps,
    heads: tl.constexpr, kv_heads: tl.constexpr, head_dim: tl.constexpr, block_size: tl.constexpr,
    at_once: tl.constexpr, normed: tl.constexpr,
):  # fmt: skip
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
