"""Collectives of a stage's ranks: the argmax over a vocabulary that is split among them."""

import math

import pytest
import torch
from torch import Tensor

from spmd.parallel.groups import connect
from spmd.parallel.tensor import TensorParallel, likeliest
from spmd.schedule.request import NO_TOKEN
from spmd.topology import Topology
from tests.support.ranks import Ranks


def slice_of(logits: Tensor, rank: int, size: int) -> Tensor:
    """A rank's columns, those of the padding larger than all others."""
    width = -(-logits.shape[1] // size)
    padding = logits.new_full((len(logits), size * width - logits.shape[1]), 1e4)
    return torch.cat([logits, padding], dim=1)[:, rank * width : (rank + 1) * width].contiguous()


def argmaxes(rank: int, size: int, batches: list[Tensor], device: str) -> list[list[int]]:
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    groups = connect(Topology(tp=size, rank=rank), where)
    tp = TensorParallel(rank, size, groups.tensor)
    found = [tp.argmax_vocab(slice_of(batch, rank, size).to(where), batch.shape[1]) for batch in batches]
    assert all(tokens.dtype == torch.int64 for tokens in found)
    return [tokens.tolist() for tokens in found]


def argmax(batch: Tensor) -> list[int]:
    """Of each row, and NO_TOKEN where the largest is no finite number."""
    best = [max(row) if not any(map(math.isnan, row)) else math.nan for row in batch.tolist()]
    chosen = batch.argmax(-1).tolist()
    return [token if math.isfinite(top) else NO_TOKEN for token, top in zip(chosen, best, strict=True)]


def ties() -> Tensor:
    """Rows of 11 logits whose largest stands in several places, in one slice and in several."""
    rows = torch.full((5, 11), -1.0)
    for row, places in enumerate([(0, 10), (3, 4, 5), (6, 7), (10,), tuple(range(11))]):
        rows[row, list(places)] = 2.0
    return rows


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    nan = ties()
    nan[1, 9] = nan[2, 0] = float("nan")
    nan[3, 4], nan[4, 10] = float("inf"), float("-inf")
    return [
        *(torch.randn(7, vocab, generator=generator) for vocab in (5, 6, 50, 1_001)),
        torch.randn(64, 301, generator=generator).to(torch.bfloat16),  # hardly a row without equal logits near the top
        torch.randn(64, 3, generator=generator).mul(2).round().to(torch.bfloat16),
        torch.zeros(0, 10),
        torch.full((2, 4), float("-inf")),
        torch.full((2, 4), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16),
        ties(),
        -ties().abs(),
        nan,
    ]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_argmax_over_slices_is_that_of_the_whole_on_every_rank(ranks: Ranks, size: int) -> None:
    expected = [argmax(batch) for batch in batches()]
    assert expected[-1] == [0, NO_TOKEN, NO_TOKEN, NO_TOKEN, 0] and expected[7] == [NO_TOKEN] * 2
    assert [likeliest(batch).tolist() for batch in batches()] == expected
    assert ranks.run(size, argmaxes, size, batches(), "cpu") == [expected] * size


def test_a_rank_may_hold_nothing_but_padding(ranks: Ranks) -> None:
    few = torch.tensor([[-3.0, -2.0, -2.0], [-1.0, -2.0, -3.0]])
    assert ranks.run(4, argmaxes, 4, [few, few.repeat(1, 3)[:, :5]], "cpu") == [[[1, 0], [1, 0]]] * 4


def test_token_ids_that_no_float32_holds_stay_exact(ranks: Ranks) -> None:
    assert ranks.run(2, beyond_float32) == [[2**24 + 1]] * 2


def beyond_float32(rank: int) -> list[int]:
    tp = TensorParallel(rank, 2, connect(Topology(tp=2, rank=rank), torch.device("cpu")).tensor)
    logits = torch.zeros(1, 2**23 + 1, dtype=torch.bfloat16)  # ids up to 2**24 + 1
    logits[0, -1] = rank
    return tp.argmax_vocab(logits, 2**24 + 2).tolist()


def captured(rank: int, size: int) -> list[int]:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    tp = TensorParallel(rank, size, connect(Topology(tp=size, rank=rank), device).tensor)
    whole = torch.randn(8, 1_001, generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(8, -(-1_001 // size), device=device)
    tp.argmax_vocab(logits, 1_001)  # the communicator is made outside of the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = tp.argmax_vocab(logits, 1_001)
    logits.copy_(slice_of(whole, rank, size))
    graph.replay()
    assert tokens.tolist() == whole.argmax(-1).tolist()
    return tokens.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_devices_it_is_the_same_and_can_be_captured(ranks: Ranks) -> None:
    assert ranks.run(2, argmaxes, 2, batches()[:6], "cuda") == [[b.argmax(-1).tolist() for b in batches()[:6]]] * 2
    first, second = ranks.run(2, captured, 2)
    assert first == second
