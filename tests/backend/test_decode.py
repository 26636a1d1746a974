"""Decode rows in plain PyTorch: which are read at once, and that each attends to its own tokens alone."""

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.decode import DecodePlan, cut
from spmd.backend.plain.gather import GATHER_BYTES, BlockGather
from spmd.model.batch import Batch
from spmd.model.cache_spec import CacheSpec

SIZE, KV_HEADS, GROUP, HEAD_DIM = 4, 2, 3, 8
SPEC = CacheSpec(KV_HEADS, HEAD_DIM, torch.float32)
BLOCK_BYTES = SIZE * SPEC.token_bytes


@pytest.mark.parametrize(
    ("widths", "most", "worth", "cuts"),
    [
        ([7], 100, 0, [1]),
        ([7, 6, 5, 4], 100, 0, [4]),
        ([7, 6, 4, 3, 1], 100, 0, [3, 1, 1]),
        ([400] + [7] * 31, 1000, 8, [1, 31]),
        ([400, 2, 1], 2000, 1000, [3]),
        ([9] * 7, 27, 0, [3, 3, 1]),
        ([400, 300, 30, 20], 100, 0, [1, 1, 2]),
    ],
    ids=["one", "alike", "halves", "one long", "not worth it", "too much", "one is too much"],
)
def test_groups(widths: list[int], most: int, worth: int, cuts: list[int]) -> None:
    assert [part.stop - part.start for part in cut(widths, most, worth)] == cuts


@pytest.mark.parametrize("seed", range(20))
def test_any_rows_are_read_with_little_beside_them(seed: int) -> None:
    rng = random.Random(seed)
    most, worth = rng.randint(1, 500), rng.randint(0, 50)
    widths = sorted((1 + int(rng.paretovariate(0.7)) % 900 for _ in range(rng.randint(1, 80))), reverse=True)
    parts = cut(widths, most, worth)
    assert [0, *(part.stop for part in parts)] == [*(part.start for part in parts), len(widths)]
    read = [widths[part.start] * (part.stop - part.start) for part in parts]
    for part, blocks in zip(parts, read, strict=True):
        assert blocks <= most or part.stop - part.start == 1
        assert blocks <= 2 * (sum(widths[part]) + worth)


def attention(lengths: list[int], window: int | None) -> tuple[Tensor, Tensor, DecodePlan]:
    """What a plan of these rows gives, what is right, and the plan. Rows of length 0 are padding."""
    torch.manual_seed(0)
    widths = [max(length - 1, 0) // SIZE + 1 for length in lengths]
    cache = KVCache([SPEC], 1 + sum(widths), SIZE)
    cache.keys.normal_()
    cache.values.normal_()
    tables = torch.zeros(len(lengths) + 1, max(widths) + 2, dtype=torch.int32)
    blocks = (1 + torch.randperm(sum(widths))).int().split(widths)
    seats = torch.randperm(len(lengths))
    for row, length in enumerate(lengths):
        if length:
            tables[seats[row], : widths[row]] = blocks[row]
        else:
            seats[row] = len(lengths)
    positions = torch.tensor([max(length - 1, 0) for length in lengths])
    batch = Batch(positions, seats, tables, widths, [], None)
    plan = DecodePlan(batch, BlockGather(cache, max(lengths)), GROUP, {window})
    q = torch.randn(len(lengths), KV_HEADS * GROUP, HEAD_DIM)
    right = []
    for row, length in enumerate(lengths):
        start = max(0, length - window) if window else 0
        k, v = (
            part[0][tables[seats[row], : widths[row]].long()].transpose(0, 1).flatten(1, 2)[:, start : max(length, 1)]
            for part in (cache.keys, cache.values)
        )
        right.append(F.scaled_dot_product_attention(q[row, :, None], k, v, enable_gqa=True).flatten())
    return plan.attend(0, window, q), torch.stack(right), plan


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("most", [1, 30, 10_000], ids="at most {} blocks".format)
def test_rows_of_any_lengths_in_any_order(monkeypatch: pytest.MonkeyPatch, window: int | None, most: int) -> None:
    monkeypatch.setitem(GATHER_BYTES, "cpu", most * BLOCK_BYTES)
    monkeypatch.setattr("spmd.backend.plain.decode.WORTH", most)
    lengths = [9, 300, 1, 17, 0, 30, 4, 301, 5, 0, 64, 12]
    found, right, plan = attention(lengths, window)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(plan.groups) > 2 and plan.order is not None


def test_equal_rows_stay_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a graph that is captured with them needs no numbers from the host."""
    monkeypatch.setitem(GATHER_BYTES, "cpu", 8 * BLOCK_BYTES)
    found, right, plan = attention([13] * 7, None)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert len(plan.groups) == 4 and plan.order is None
    assert all(a.rows.stop == b.rows.start for a, b in pairwise(plan.groups))


def test_one_long_row_costs_the_others_nothing() -> None:
    _, _, plan = attention([25] * 15 + [6000] + [25] * 16, None)
    own = KV_HEADS * (1500 + 31 * 7)
    assert sum(len(group.index) for group in plan.groups) == own


def test_buffers_hold_the_longest_request_and_what_is_read_at_once() -> None:
    cache = KVCache([SPEC], 2, SIZE)
    usual, long = BlockGather(cache, 100), BlockGather(cache, 10**6)
    assert sum(buffer.nbytes for buffer in usual.buffers) == usual.blocks * BLOCK_BYTES == GATHER_BYTES["cpu"]
    assert sum(buffer.nbytes for buffer in long.buffers) == 10**6 * SPEC.token_bytes
