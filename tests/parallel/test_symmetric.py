"""Sums over tensor ranks, by collectives and through shared memory: exact, in one graph many times over, no race."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from spmd.parallel.groups import connect
from spmd.parallel.peer_memory import MAX_SUM_BYTES, SymmetricBuffer
from spmd.parallel.tensor import TensorParallel
from spmd.topology import Topology
from tests.support.ranks import Ranks

HIDDEN = 512
TIMES = 16  # sums of one run, as a forward makes one after the other
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
two_gpus = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
wires = pytest.mark.parametrize(
    "wire", ["gloo", pytest.param("nccl", marks=two_gpus), pytest.param("symmetric", marks=two_gpus)]
)


def join(rank: int, wire: str, dtype: torch.dtype) -> tuple[TensorParallel, torch.device]:
    device = torch.device("cpu") if wire == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = connect(Topology(tp=2, rank=rank), device).tensor
    assert group is not None
    buffer = SymmetricBuffer(group, dtype, device) if wire == "symmetric" else None
    return TensorParallel(rank, 2, group, buffer), device


def part(rank: int, rows: int, number: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(2 * number + rank)).to(dtype)


def sums(tp: TensorParallel, x: Tensor) -> Tensor:
    """`TIMES` sums, `[TIMES, rows, hidden]`, each of `x` plus its number; every other one of parts in the buffer."""
    found = []
    for number in range(TIMES):
        buffer = tp.sum_buffer(*x.shape) if number % 2 else None
        mine = x + number if buffer is None else torch.add(x, number, out=buffer)
        found.append(tp.all_reduce(mine).clone())
    return torch.stack(found)


def expected(rows: int, number: int, dtype: torch.dtype) -> Tensor:
    parts = [part(rank, rows, number, dtype) for rank in (0, 1)]
    return torch.stack([(parts[0] + step) + (parts[1] + step) for step in range(TIMES)])


def captured(tp: TensorParallel, like: Tensor) -> Callable[[Tensor], Tensor]:
    """`sums` as a CUDA graph."""
    held = torch.zeros_like(like)
    sums(tp, held)  # connections are opened outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = sums(tp, held)

    def replay(x: Tensor) -> Tensor:
        held.copy_(x)
        graph.replay()
        return output

    return replay


def summed(rank: int, wire: str, dtype_name: str, rows: int, by_graph: bool) -> None:
    dtype = DTYPES[dtype_name]
    tp, device = join(rank, wire, dtype)
    run = captured(tp, part(rank, rows, 0, dtype).to(device)) if by_graph else partial(sums, tp)
    found = [run(part(rank, rows, number, dtype).to(device)).clone() for number in range(5)]
    for number, actual in enumerate(found):
        assert torch.equal(actual.cpu(), expected(rows, number, dtype)), (rows, number)


@wires
@pytest.mark.parametrize("rows", [1, 7, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce(ranks: Ranks, wire: str, dtype: str, rows: int) -> None:
    ranks.run(2, summed, wire, dtype, rows, False)


@pytest.mark.parametrize("wire", [pytest.param(wire, marks=two_gpus) for wire in ("nccl", "symmetric")])
@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_reduce_in_a_graph(ranks: Ranks, wire: str, dtype: str, rows: int) -> None:
    ranks.run(2, summed, wire, dtype, rows, True)


def summed_without_buffer(rank: int) -> None:
    tp, device = join(rank, "symmetric", torch.bfloat16)
    rows = MAX_SUM_BYTES // torch.bfloat16.itemsize // HIDDEN
    assert tp.sum_buffer(rows, HIDDEN) is not None and tp.sum_buffer(rows + 1, HIDDEN) is None
    mine = part(rank, rows + 1, 0, torch.bfloat16).to(device)
    right = part(0, rows + 1, 0, torch.bfloat16) + part(1, rows + 1, 0, torch.bfloat16)
    assert torch.equal(tp.all_reduce(mine).cpu(), right)
    assert torch.equal(mine.cpu(), right), "in place"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_what_is_too_large_for_the_buffer_goes_through_nccl(ranks: Ranks) -> None:
    ranks.run(2, summed_without_buffer)
