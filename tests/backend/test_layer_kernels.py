"""The Triton kernel against plain PyTorch. With TRITON_INTERPRET=1 it needs no GPU: Triton then runs it in Python."""

from typing import TypedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.triton_here import DEVICE, MARKS

pytestmark = MARKS


class Tolerance(TypedDict):
    rtol: float
    atol: float


BLOCKS, BLOCK_SIZE, EPS = 5, 16, 1e-5
TOLERANCE: dict[torch.dtype, Tolerance] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5},  # one step
}


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def normed_and_rotated(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
    """Of `[T, heads, head_dim]`, all in float32."""
    x = x.float()
    if weight is not None:
        x = F.rms_norm(x, weight.shape, weight.float(), EPS)
    low, high = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def at(cache: Tensor, slots: Tensor) -> Tensor:
    """What stands in these places of a cache `[blocks, kv_heads, block_size, head_dim]`: `[T, kv_heads, head_dim]`."""
    return cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(16, 8, 128), (32, 4, 64), (6, 2, 64), (7, 1, 128), (3, 3, 256)]
)
@pytest.mark.parametrize("rows", [1, 21])
def test_norm_rope_append(
    rows: int, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, dtype: torch.dtype
) -> None:
    from spmd.backend.cuda.layer_kernels import norm_rope_append

    qkv = drawn(rows, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    norms = (1 + 0.2 * drawn(2, head_dim, seed=1)).to(dtype)
    angles = 3 * drawn(rows, head_dim // 2, seed=2)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=torch.Generator().manual_seed(3))[:rows].to(DEVICE)
    before = drawn(2, BLOCKS, kv_heads, BLOCK_SIZE, head_dim, dtype=dtype, seed=4)
    keys, values = before.clone()
    q, k, v = qkv.clone().unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)

    queries = norm_rope_append(qkv, (norms[0], norms[1]) if qk_norm else None, EPS, cos, sin, slots, keys, values)

    expected = [normed_and_rotated(x, norms[i] if qk_norm else None, cos, sin).to(dtype) for i, x in enumerate((q, k))]
    torch.testing.assert_close(queries, expected[0], **TOLERANCE[dtype])
    torch.testing.assert_close(at(keys, slots), expected[1], **TOLERANCE[dtype])
    assert torch.equal(at(values, slots), v)
    untouched = torch.ones(BLOCKS * BLOCK_SIZE, dtype=torch.bool, device=DEVICE).index_fill(0, slots, False)
    elsewhere = untouched.nonzero()[:, 0]
    for cache, old in zip((keys, values), before, strict=True):
        assert torch.equal(at(cache, elsewhere), at(old, elsewhere))


def test_norm_rope_append_of_padding_and_of_nothing() -> None:
    """All padding rows write to one place; no rows are fine too."""
    from spmd.backend.cuda.layer_kernels import norm_rope_append

    keys, values = drawn(2, BLOCKS, 1, BLOCK_SIZE, 64)
    qkv, slots = drawn(1, 4 * 64).expand(9, -1).contiguous(), torch.zeros(9, dtype=torch.int64, device=DEVICE)
    turned, still = torch.ones(9, 32, device=DEVICE), torch.zeros(9, 32, device=DEVICE)
    queries = norm_rope_append(qkv, None, EPS, turned, still, slots, keys, values)
    assert torch.equal(queries.flatten(1), qkv[:, :128])
    assert torch.equal(torch.stack([keys[0, 0, 0], values[0, 0, 0]]).flatten(), qkv[0, 128:])
    none = norm_rope_append(qkv[:0], None, EPS, turned[:0], still[:0], slots[:0], keys, values)
    assert none.shape == (0, 2, 64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [64, 896, 4096])
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_add_norm(rows: int, size: int, dtype: torch.dtype) -> None:
    from spmd.backend.cuda.layer_kernels import add_norm

    x, residual = drawn(rows, size, dtype=dtype), drawn(rows, size, dtype=dtype, seed=1)
    weight = (1 + 0.2 * drawn(size, seed=2)).to(dtype)
    exact = x.float() + residual.float()
    for given, expected in ((None, x.float()), (residual.clone(), exact)):
        normed, total = add_norm(x.clone(), given, weight, EPS)
        torch.testing.assert_close(total, expected.to(dtype))
        expected = F.rms_norm(expected, (size,), weight.float(), EPS).to(dtype)
        torch.testing.assert_close(normed, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("inner", [64, 2304, 4096])
@pytest.mark.parametrize(("rows", "many"), [(0, 4096), (1, 4096), (9, 4096), (9, 8)])
def test_gated(rows: int, many: int, inner: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from spmd.backend.cuda import layer_kernels as kernels
    from spmd.backend.cuda.layer_kernels import gated

    monkeypatch.setattr(kernels, "MIN_GROUPED_ROWS", many)
    gate_up = 3 * drawn(rows, 2 * inner, dtype=dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    expected = (F.silu(gate) * up).to(dtype)
    torch.testing.assert_close(gated(gate_up), expected, **TOLERANCE[dtype])
    known = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    torch.testing.assert_close(gated(gate_up, known)[:5], expected[:5], **TOLERANCE[dtype])
