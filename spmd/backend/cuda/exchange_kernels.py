"""Triton kernels for the sums of few rows of experts on their way between GPUs; `peer_memory` says what an exchange is.

Who writes: `_send`, on each rank, stores its share of every row's sum in the memory of the rank whose row it is, in
words of eight bytes: two numbers and the number of the exchange. Who reads: `_receive`, on that rank, reads the words
of all ranks again and again until each bears the number of this exchange, and adds up what they hold. A GPU stores
eight bytes at once, so whoever sees the number sees the two numbers that came with it: neither a fence nor a count
orders the two, the word itself does. Numbers of exchanges never repeat (they count rows), and nothing else is stored
there, so no earlier word can be taken for a later one.

`_receive` is part of the next norm, without a launch of its own (`add_norm`); where there is none, `collect` runs it
alone. It waits for all rows, also for those that are padding: only then have the other ranks read all that this one
sent, and this one may send its next rows.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spmd.backend.cuda.layer_kernels import launch, wait
from spmd.model.backend import PendingSums
from spmd.parallel.peer_memory import PeerMemory


@dataclass(frozen=True)
class WordSums(PendingSums):
    """Sums `[rows, peers.width]` that come in `peers.words`."""

    peers: PeerMemory
    rows: int
    dtype: torch.dtype


def send(found: Tensor, packed: Tensor, top_k: int, first: int, experts: int, peers: PeerMemory) -> WordSums:
    """Send each rank this one's share of its rows' sums; returns those that come to this rank.

    Args:
        found: outputs `[T * top_k, hidden]` of each token's experts, in their order, where they are this rank's.
        packed: `[T, hidden + 2 * top_k]` of all ranks, see `spmd.backend.cuda.expert_kernels.choose`.
        first, experts: which experts are this rank's.
    """
    rows, half = len(packed) // peers.size, peers.width // 2
    _send[(rows, peers.size)](
        found, packed, packed.view(torch.int16), peers.words(len(packed)), peers.expected, packed.stride(0),
        half, triton.next_power_of_2(half), top_k, first, experts, peers.rank, peers.size, packed.is_cuda,
        num_warps=4, **launch(packed),
    )  # fmt: skip
    return WordSums(peers, rows, packed.dtype)


def collect(sums: WordSums, rows: int) -> Tensor:
    """The first `rows` sums, `[rows, hidden]`."""
    out = torch.empty(rows, sums.peers.width, dtype=sums.dtype, device=sums.peers.expected.device)
    _launch(sums, out, out, out, 0.0, added=False)
    return out


def add_norm(sums: WordSums, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `spmd.backend.cuda.layer_kernels.add_norm`, of as many rows as the residual has."""
    normed = torch.empty_like(residual)
    _launch(sums, normed, residual, weight, eps, added=True)
    return normed, residual


def _launch(sums: WordSums, out: Tensor, total: Tensor, weight: Tensor, eps: float, added: bool) -> None:
    peers, half = sums.peers, sums.peers.width // 2
    _receive[(sums.rows,)](
        peers.words(peers.size * sums.rows)[peers.rank], peers.expected, out, total, weight, eps, len(out),
        half, triton.next_power_of_2(half), peers.size, added, out.is_cuda, num_warps=8, **launch(out),
    )  # fmt: skip


@triton.jit
def _send(
    found, packed, numbers, targets, expected, stride,
    half: tl.constexpr, width: tl.constexpr, top_k: tl.constexpr, first: tl.constexpr, experts: tl.constexpr,
    own: tl.constexpr, ranks: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """As expert_kernels.py's `_sum`: columns c and half + c and the exchange's number in one word."""
    wait(early)
    column = tl.arange(0, width)
    rows, whose = tl.num_programs(0), tl.program_id(1)
    row = whose * rows + tl.program_id(0)
    low, high = tl.zeros([width], tl.float32), tl.zeros([width], tl.float32)
    for k in tl.static_range(top_k):
        number = tl.load(numbers + row * stride + 2 * half + top_k + k)
        here = ((number > first) & (number <= first + experts)).to(tl.int32)
        weight = tl.load(packed + row * stride + 2 * half + k).to(tl.float32)
        source = found + (row * top_k + k) * 2 * half + column
        low += weight * tl.load(source, column < half * here, 0).to(tl.float32)
        high += weight * tl.load(source + half, column < half * here, 0).to(tl.float32)
    dtype: tl.constexpr = found.dtype.element_ty
    word = (tl.load(expected) << 32) + (low.to(dtype).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF)
    word += (high.to(dtype).to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << 16
    for rank in tl.static_range(ranks):
        if whose == rank:
            tl.store(targets[rank] + (own * rows + tl.program_id(0)) * half + column, word, column < half)


@triton.jit
def _receive(
    words, expected, out, total, weight, eps, tokens,
    half: tl.constexpr, width: tl.constexpr, ranks: tl.constexpr, added: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """What `_send` sent to this rank, added up in the order of ranks; `added`: to `total`, and the norm of that."""
    wait(early)
    row, column = tl.program_id(0), tl.arange(0, width)
    inside = column < half
    number = tl.load(expected).to(tl.int32)
    dtype: tl.constexpr = out.dtype.element_ty
    low, high = tl.zeros([width], tl.float32), tl.zeros([width], tl.float32)
    missing = 1
    while missing > 0:
        late = tl.zeros([width], tl.int32)
        low, high = tl.zeros([width], tl.float32), tl.zeros([width], tl.float32)
        for rank in tl.static_range(ranks):
            word = tl.load(words + (rank * tl.num_programs(0) + row) * half + column, inside, 0, volatile=True)
            late += ((word >> 32).to(tl.int32) != number).to(tl.int32)
            low += word.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            high += (word >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        missing = tl.max(tl.where(inside, late, 0), 0)
    if row < tokens:
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
        at = row.to(tl.int64) * 2 * half + column
        if added:
            low += tl.load(total + at, inside, 0).to(tl.float32)
            high += tl.load(total + half + at, inside, 0).to(tl.float32)
            tl.store(total + at, low, inside)
            tl.store(total + half + at, high, inside)
            scale = tl.rsqrt((tl.sum(low * low) + tl.sum(high * high)) / (2 * half) + eps)
            low *= scale * tl.load(weight + column, inside, 0).to(tl.float32)
            high *= scale * tl.load(weight + half + column, inside, 0).to(tl.float32)
        tl.store(out + at, low, inside)
        tl.store(out + half + at, high, inside)
