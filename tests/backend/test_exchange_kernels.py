"""Experts whose ranks exchange rows and sums through each other's memory: as exact as without, in any order of sizes.

With TRITON_INTERPRET=1 the ranks are processes that share a file, else GPUs.
"""

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmd.model.backend import PendingSums
from spmd.parallel.groups import connect
from spmd.parallel.peer_memory import MAX_DECODE_ROWS, PeerMemory, share, size_of
from spmd.topology import Topology
from tests.backend.test_expert_kernels import FEW_DTYPE
from tests.support.ranks import Ranks
from tests.support.triton_here import INTERPRETED

HIDDEN, INNER, EXPERTS, TOP_K, CAPACITY = 128, 64, 12, 4, 96
EXCHANGES = [(5, 5), (1, 8), (12, 16), (12, 16), (0, 1), (7, 32), (3, 3)]  # tokens of rank 0, rows of each
SIZE = HIDDEN + 2 * TOP_K, HIDDEN
here = INTERPRETED or torch.cuda.device_count() > 1
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not here, reason="needs two GPUs or TRITON_INTERPRET=1")]


def drawn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


class Rank:
    """One rank of `size`, which knows what the others have, too."""

    def __init__(self, rank: int, size: int, folder: Path, dtype: torch.dtype) -> None:
        self.rank, self.size, self.dtype = rank, size, dtype
        self.device = torch.device("cpu") if INTERPRETED else torch.device("cuda", rank)
        if INTERPRETED:
            count = size_of(size, CAPACITY, *SIZE)
            files = [torch.from_file(str(folder / str(r)), True, count, dtype=torch.uint8) for r in range(size)]
            self.peers = PeerMemory(rank, CAPACITY, *SIZE, files, torch.zeros(2, dtype=torch.int64))
        else:
            torch.cuda.set_device(self.device)
            group = connect(Topology(dp=size, rank=rank), self.device, ep=True).experts
            assert group is not None
            self.peers = share(group, CAPACITY, *SIZE, self.device)
        self.gate_up = self.drawn(EXPERTS, 2 * INNER, HIDDEN, seed=1) / HIDDEN**0.5
        self.down = self.drawn(EXPERTS, HIDDEN, INNER, seed=2) / INNER**0.5

    def drawn(self, *shape: int, seed: int) -> Tensor:
        return drawn(*shape, dtype=self.dtype, device=self.device, seed=seed)

    def tokens(self, rank: int, count: int, number: int) -> tuple[Tensor, Tensor]:
        seed = 10 + 2 * (number * self.size + rank)
        return self.drawn(count, HIDDEN, seed=seed), self.drawn(count, EXPERTS, seed=seed + 1)

    def owned(self, rank: int) -> tuple[int, Tensor, Tensor]:
        first, count = rank * EXPERTS // self.size, EXPERTS // self.size
        return first, self.gate_up[first : first + count], self.down[first : first + count]

    def exchange(self, x: Tensor, logits: Tensor, rows: int) -> Tensor | PendingSums:
        from spmd.backend.cuda.expert_kernels import choose, mix

        packed = choose(x, logits, rows, TOP_K, True, self.peers)
        return mix(packed, TOP_K, *self.owned(self.rank), self.peers)

    def exchanged(self, x: Tensor, logits: Tensor, rows: int) -> Tensor:
        return collected(self.exchange(x, logits, rows), rows)

    def expected(self, counts: list[int], number: int, rows: int) -> Tensor:
        """Of this rank's tokens, from what all ranks have, without exchange."""
        from spmd.backend.cuda.expert_kernels import choose, mix

        each = [choose(*self.tokens(rank, count, number), rows, TOP_K, True) for rank, count in enumerate(counts)]
        shares = []
        for rank in range(self.size):
            sums = mix(torch.cat(each), TOP_K, *self.owned(rank))
            assert isinstance(sums, Tensor)
            shares.append(sums.float())
        total = sum(shares[1:], shares[0]).to(self.dtype)
        return total[self.rank * rows : self.rank * rows + counts[self.rank]]


def collected(sums: Tensor | PendingSums, rows: int) -> Tensor:
    from spmd.backend.cuda.exchange_kernels import WordSums, collect

    if isinstance(sums, Tensor):
        return sums
    assert isinstance(sums, WordSums)
    return collect(sums, rows)


def exchanged(rank: int, size: int, folder: str, few: bool) -> None:
    from spmd.backend.cuda import expert_kernels

    most = MAX_DECODE_ROWS if few else 0
    with patch.object(expert_kernels, "MAX_DECODE_ROWS", most):  # the process goes on to other tests
        exchange_all(rank, size, folder, few)


def exchange_all(rank: int, size: int, folder: str, few: bool) -> None:
    me = Rank(rank, size, Path(folder), FEW_DTYPE if few else torch.bfloat16)
    for number, (tokens, rows) in enumerate(EXCHANGES):
        counts = [tokens, *[rows] * (size - 1)]
        x, logits = me.tokens(rank, counts[rank], number)
        found = me.exchanged(x, logits, rows)
        assert found.shape == (rows, HIDDEN)
        right = me.expected(counts, number, rows)
        close = 2**-7 if INTERPRETED and not few else 0.0  # the interpreter cuts what bfloat16 doesn't hold
        torch.testing.assert_close(found[: counts[rank]], right, rtol=close, atol=close, msg=f"{number}, rank {rank}")


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.skipif(not INTERPRETED, reason="two GPUs"))])
def test_sums_are_those_without_exchange(ranks: Ranks, tmp_path: Path, size: int, few: bool) -> None:
    ranks.run(size, exchanged, size, str(tmp_path), few)


def normed(rank: int, size: int, folder: str) -> None:
    """Every other exchange leaves the sums to the norm, with fewer tokens than rows at times."""
    from spmd.backend.cuda import exchange_kernels

    me = Rank(rank, size, Path(folder), FEW_DTYPE)
    weight = me.drawn(HIDDEN, seed=3)
    for number, (tokens, rows) in enumerate(EXCHANGES * 2):
        counts = [tokens, *[rows] * (size - 1)]
        sums = me.exchange(*me.tokens(rank, counts[rank], number), rows)
        right = me.expected(counts, number, rows)
        if number % 2:
            assert torch.equal(collected(sums, counts[rank]), right)
            continue
        residual = me.drawn(counts[rank], HIDDEN, seed=4)
        total = residual.float() + right.float()
        assert isinstance(sums, exchange_kernels.WordSums)
        output, added = exchange_kernels.add_norm(sums, residual, weight, 1e-6)
        assert added is residual
        torch.testing.assert_close(added, total.to(me.dtype), rtol=0, atol=0)
        wanted = F.rms_norm(total, (HIDDEN,), weight.float(), 1e-6).to(me.dtype)
        torch.testing.assert_close(output, wanted, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.skipif(not INTERPRETED, reason="two GPUs"))])
def test_the_next_norm_takes_the_sums_itself(ranks: Ranks, tmp_path: Path, size: int) -> None:
    ranks.run(size, normed, size, str(tmp_path))


def replayed(rank: int) -> None:
    """Two graphs of many exchanges in turn, and exchanges without a graph between them."""
    me = Rank(rank, 2, Path(), torch.bfloat16)
    graphs: list[tuple[int, Callable[[int], Tensor]]] = [(rows, captured(me, rows)) for rows in (8, 24)]
    for number in range(20):
        for rows, replay in graphs:
            assert torch.equal(replay(number), me.expected([rows, rows], number, rows)), (number, rows)
        x, logits = me.tokens(rank, 5, number)
        assert torch.equal(me.exchanged(x, logits, 5), me.expected([5, 5], number, 5)), number


def captured(me: Rank, rows: int, times: int = 10) -> Callable[[int], Tensor]:
    x, logits = me.tokens(me.rank, rows, 0)
    me.exchanged(x, logits, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(times):
            output = me.exchanged(x, logits, rows)

    def replay(number: int) -> Tensor:
        for held, new in zip((x, logits), me.tokens(me.rank, rows, number), strict=True):
            held.copy_(new)
        graph.replay()
        return output

    return replay


@pytest.mark.skipif(INTERPRETED, reason="needs two GPUs")
def test_graphs_hold_exchanges(ranks: Ranks) -> None:
    ranks.run(2, replayed)
