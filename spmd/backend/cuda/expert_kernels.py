"""Triton kernels for a layer's experts in bfloat16 on GPUs: who goes where, products of few rows, sums.

torch's `grouped_mm` does the products of many rows well; of a decode batch's few, about eight an expert, it reads the
weights at two thirds of the memory's rate, and the small steps around it take nearly as long again. Here a decode
batch takes five launches a layer, six with an exchange; of a prompt's chunk, rows for other ranks' experts are neither
copied nor computed.

Experts are counted from 1 in what travels between ranks: 0 marks padding. `first` is the number before this rank's
first.

Where ranks see each other's memory (`spmd.parallel.peer_memory`, which says why that is safe), the kernels exchange
rows and sums themselves. `_choose` stores each row in the memory of all ranks and then adds to a count there
(`_signal`: a release, behind all that its thread block has stored); `_list`, or `_wait_for_rows` in front of kernels
that don't wait themselves, reads the count until all rows have come (`_await`: an acquire, so it sees what was stored
before). Sums of many rows go the same way back, by `_sum` and `_collect`; those of few in words that need no count
(`spmd.backend.cuda.exchange_kernels`).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from spmd.backend.cuda.exchange_kernels import send
from spmd.backend.cuda.layer_kernels import gated, launch, wait
from spmd.model.backend import ExpertLayer, Sums
from spmd.model.linear import Dense
from spmd.parallel.peer_memory import MAX_DECODE_ROWS, PeerMemory

# Of a decode product's block: rows of x (most experts' share of a decode batch; those with more take further turns),
# weight rows, columns of a step, steps in flight.
TILE_ROWS, TILE_N, TILE_K, STAGES = 16, 64, 128, 3
BLOCK_COLUMNS = 2048  # of a row copied or summed at once
ROWS_PER_COUNT = 8  # of a chunk: counts in another GPU's memory come one after the other


def experts(x: Tensor, logits: Tensor, layer: ExpertLayer, rows: int) -> Sums:
    """See `Backend.experts`. The host need not know how many tokens an expert gets."""
    gate_up, down, ep, top_k = layer.gate_up, layer.down, layer.ep, layer.top_k
    assert isinstance(gate_up, Dense) and isinstance(down, Dense)
    first, peers = ep.owned(layer.num_experts).start, ep.peers_for(rows)
    packed = choose(x, logits, rows, top_k, layer.normalize, peers)
    if peers:
        sums = mix(packed, top_k, first, gate_up.values, down.values, peers)
        return sums[: len(x)] if isinstance(sums, Tensor) else sums
    shares = mix(ep.gather(packed, rows), top_k, first, gate_up.values, down.values)
    assert isinstance(shares, Tensor)
    return ep.scatter_sum(shares)[: len(x)]


def choose(
    x: Tensor, logits: Tensor, rows: int, top_k: int, normalize: bool, peers: PeerMemory | None = None
) -> Tensor:
    """The tokens and where they go, ready to travel: see `spmd.backend.plain.experts.Routed.packed`.

    `x` `[T, hidden]` and `logits` `[T, experts]`, of two bytes a number; returns `[rows, hidden + 2 * top_k]`, of
    which those behind the T-th are padding; with peers `[ranks * rows, …]` in each one's memory, others' come later.
    """
    tokens, hidden = x.shape
    count = logits.shape[1]
    if peers:
        targets, rank = peers.rows(peers.size * rows, x.dtype), peers.rank
        arrived, expected = peers.arrived(), peers.expected
    else:
        targets, rank = (x.new_empty(rows, hidden + 2 * top_k),), 0
        arrived, expected = targets, targets[0]
    group = _group(rows)
    _choose[(triton.cdiv(rows, group),)](
        x, logits, targets, tuple(target.view(torch.int16) for target in targets), arrived, expected, tokens, rows,
        hidden, count, top_k, normalize, *map(triton.next_power_of_2, (hidden, count, top_k)), group, rank,
        len(targets), x.is_cuda, num_warps=1, **launch(x),
    )  # fmt: skip
    return targets[rank]


def mix(packed: Tensor, top_k: int, first: int, gate_up: Tensor, down: Tensor, peers: PeerMemory | None = None) -> Sums:
    """This rank's share of the weighted sum of each token's experts, `[T, hidden]`.

    With peers, who must all call it, the sums of all shares, of this rank's tokens alone: `[T / ranks, hidden]`; few
    are left on their way.

    Args:
        packed: `[T, hidden + 2 * top_k]`, see `choose`.
        gate_up: `[own experts, 2 * inner, hidden]`.
        down: `[own experts, hidden, inner]`.
    """
    tokens, hidden = len(packed), down.shape[1]
    run = _decode if tokens <= MAX_DECODE_ROWS else _grouped
    found, places = run(packed, top_k, first, gate_up, down, peers)
    if peers and places is None:
        return send(found, packed, top_k, first, len(down), peers)
    out = packed.new_empty(tokens // peers.size if peers else tokens, hidden)
    targets, rank = (peers.sums(tokens, out.dtype), peers.rank) if peers else ((out,), 0)
    arrived, parts, group = peers.arrived() if peers else targets, triton.cdiv(hidden, BLOCK_COLUMNS), _group(len(out))
    _sum[(triton.cdiv(len(out), group), parts, len(targets))](
        found, places, packed, packed.view(torch.int16), targets, arrived, peers.expected if peers else out, len(out),
        packed.stride(0), hidden, top_k, first, len(down), places is not None, BLOCK_COLUMNS, group, rank, len(targets),
        out.is_cuda, num_warps=4, **launch(out),
    )  # fmt: skip
    if peers:
        _collect[(len(out), parts)](
            targets[rank], out, arrived[rank], peers.expected, hidden, BLOCK_COLUMNS, peers.size, out.is_cuda,
            num_warps=4, **launch(out),
        )  # fmt: skip
    return out


def _group(rows: int) -> int:
    """Rows of a thread block: of few one, to have them all at once."""
    return 1 if rows <= MAX_DECODE_ROWS else ROWS_PER_COUNT


def _decode(
    packed: Tensor, top_k: int, first: int, gate_up: Tensor, down: Tensor, peers: PeerMemory | None
) -> tuple[Tensor, None]:
    """Outputs `[T * top_k, hidden]` of each token's experts, in their order; undefined where they aren't here."""
    tokens, stride = packed.shape
    own, hidden, inner = down.shape
    pairs = tokens * top_k
    table = torch.empty(own, tokens, dtype=torch.int32, device=packed.device)
    counts = torch.empty(own, dtype=torch.int32, device=packed.device)
    arrived, expected = (peers.arrived()[peers.rank], peers.expected) if peers else (counts, counts)
    _list[(own,)](
        packed.view(torch.int16), table, counts, arrived, expected, tokens, stride, hidden, top_k, first,
        triton.next_power_of_2(pairs), peers.size if peers else 1, packed.is_cuda, num_warps=4, **launch(packed),
    )  # fmt: skip
    middle, found = packed.new_empty(pairs, inner), packed.new_empty(pairs, hidden)
    for x, each, weight, is_gated, out in ((packed, top_k, gate_up, True, middle), (middle, 1, down, False, found)):
        size = out.shape[1]
        _product[(triton.cdiv(size, TILE_N), own)](
            x, weight, out, table, counts, tokens, x.stride(0), size, weight.shape[2], each, is_gated, TILE_ROWS,
            TILE_N, TILE_K, x.is_cuda, num_warps=4, num_stages=STAGES, **launch(x),
        )  # fmt: skip
    return found, None


def _grouped(
    packed: Tensor, top_k: int, first: int, gate_up: Tensor, down: Tensor, peers: PeerMemory | None
) -> tuple[Tensor, Tensor]:
    """Outputs, expert after expert, and in which place those of each token are, `[T * top_k]`.

    The host need not know how many rows an expert gets: the products read where they end.
    """
    own, hidden = down.shape[:2]
    if peers:
        _wait_for_rows[(1,)](peers.arrived()[peers.rank], peers.expected, peers.size, num_warps=1)
    numbers = packed.view(torch.int16)[:, -top_k:]
    chosen, order = ((numbers.flatten() - (first + 1)) & 0x7FFF).sort(stable=True)  # others' come behind
    wanted = torch.arange(own, dtype=chosen.dtype, device=packed.device)
    ends = torch.searchsorted(chosen, wanted, right=True, out_int32=True)
    places = torch.empty(len(order), dtype=torch.int32, device=packed.device)
    x = packed.new_empty(len(order), hidden)
    _gather[(len(order),)](
        packed, order, ends, x, places, packed.stride(0), own, hidden, top_k, BLOCK_COLUMNS, num_warps=4
    )  # fmt: skip
    both = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends)
    del x  # each of these is as large as all that a chunk needs elsewhere
    middle = gated(both, ends[-1:])
    del both
    return F.grouped_mm(middle, down.transpose(1, 2), offs=ends), places


@triton.jit
def _await(arrived, target, ranks: tl.constexpr):
    """Until each rank's count in this one's memory is `target`: what was stored before it grew can be read."""
    for rank in tl.static_range(ranks):
        seen = tl.atomic_add(arrived + rank, 0, sem="acquire", scope="sys")
        while seen < target:
            seen = tl.atomic_add(arrived + rank, 0, sem="acquire", scope="sys")


@triton.jit
def _signal(arrived, count):
    """Add to a count, after all that this thread block has stored."""
    tl.debug_barrier()  # else only the thread that adds would be known to have stored
    tl.atomic_add(arrived, count, sem="release", scope="sys")


@triton.jit
def _wait_for_rows(arrived, expected, ranks: tl.constexpr):
    """For kernels behind it that don't wait for rows themselves."""
    _await(arrived, tl.load(expected), ranks)


@triton.jit
def _choose(
    x, logits, targets, numbers, arrived, expected, tokens, rows,
    hidden: tl.constexpr, count: tl.constexpr, top_k: tl.constexpr, normalize: tl.constexpr,
    width: tl.constexpr, experts: tl.constexpr, choices: tl.constexpr,
    group: tl.constexpr, own: tl.constexpr, ranks: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """The same row in all targets, which are the ranks' or, with one, only its own; `numbers` are these in int16."""
    wait(early)
    column, expert, choice = tl.arange(0, width), tl.arange(0, experts), tl.arange(0, choices)
    first = tl.program_id(0) * group
    for i in range(group):
        row = (first + i).to(tl.int64)
        if row < rows:
            here = (row < tokens).to(tl.int32)  # padding is zeros
            place = (row + own * rows) * (hidden + 2 * top_k)
            logit = tl.load(logits + row * count + expert, expert < count * here, 0).to(tl.float32)
            values = tl.load(x + row * hidden + column, column < hidden * here, 0)
            logit = tl.where(expert < count, logit, -float("inf"))
            power = tl.exp(logit - tl.max(logit, 0))
            total = tl.sum(power, 0)  # NaN of a row without numbers, and so its weights
            power = tl.where(power == power, power, 0.0)  # lists have one place a row: it, too, takes distinct experts
            weights, chosen = tl.zeros([choices], tl.float32), tl.zeros([choices], tl.int32)
            for k in tl.static_range(top_k):
                best, index = tl.max(power, 0, return_indices=True)
                weights = tl.where(choice == k, best, weights)
                chosen = tl.where(choice == k, (index + 1) * here, chosen)
                power = tl.where(expert == index, -1.0, power)
            if normalize:
                total = tl.where(total == total, tl.sum(weights, 0), total)
            for rank in tl.static_range(ranks):
                tl.store(targets[rank] + place + column, values, column < hidden)
                tl.store(targets[rank] + place + hidden + choice, weights / total, choice < top_k)
                tl.store(numbers[rank] + place + hidden + top_k + choice, chosen.to(tl.int16), choice < top_k)
    if ranks > 1:
        tl.atomic_add(expected, rows, first == 0)
        for rank in tl.static_range(ranks):
            _signal(arrived[rank] + own, tl.minimum(group, rows - first))


@triton.jit
def _list(
    numbers, table, counts, arrived, expected, tokens, stride,
    hidden: tl.constexpr, top_k: tl.constexpr, first: tl.constexpr, width: tl.constexpr,
    ranks: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """The pairs of token and choice that went to each own expert, in their order."""
    wait(early)
    if ranks > 1:
        _await(arrived, tl.load(expected), ranks)
    own = tl.program_id(0)
    pair = tl.arange(0, width)
    source = numbers + (pair // top_k) * stride + hidden + top_k + pair % top_k
    mine = tl.load(source, pair < tokens * top_k, 0) == first + own + 1
    place = tl.cumsum(mine.to(tl.int32), 0) - 1
    tl.store(table + own * tokens + place, pair, mine)
    tl.store(counts + own, tl.sum(mine.to(tl.int32), 0))


@triton.jit
def _product(
    x, weights, out, table, counts, tokens, stride,
    size: tl.constexpr, columns: tl.constexpr, each: tl.constexpr, is_gated: tl.constexpr,
    rows: tl.constexpr, tile_n: tl.constexpr, tile_k: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Row `pair // each` of x times the weight of the pair's expert, `[pairs, size]`.

    A gated weight holds gate and up, one after the other, and the result is silu(gate) * up. Weight rows take the place
    of the matrix unit's rows, the few of x that of its columns.
    """
    wait(early)
    own = tl.program_id(1)
    count = tl.load(counts + own)
    n, k = tl.program_id(0) * tile_n + tl.arange(0, tile_n), tl.arange(0, tile_k)
    each_expert: tl.constexpr = 2 * size if is_gated else size  # rows of its weight
    weight = weights + (own.to(tl.int64) * each_expert + n)[:, None] * columns + k[None, :]
    known = (n < size)[:, None]
    for start in range(0, count, rows):
        row = start + tl.arange(0, rows)
        pair = tl.load(table + own * tokens + row, row < count, 0)
        source = x + (pair // each)[None, :] * stride + k[:, None]
        value = tl.zeros([tile_n, rows], tl.float32)
        up = tl.zeros([tile_n, rows], tl.float32)
        for c in range(0, columns, tile_k):
            inside = k + c < columns
            some = tl.load(source + c, inside[:, None] & (row < count)[None, :], 0)
            value = tl.dot(tl.load(weight + c, known & inside[None, :], 0), some, value)
            if is_gated:
                up = tl.dot(tl.load(weight + size * columns + c, known & inside[None, :], 0), some, up)
        if is_gated:
            value = value / (1 + tl.exp(-value)) * up
        target = out + pair[None, :] * size + n[:, None]
        tl.store(target, value.to(out.dtype.element_ty), known & (row < count)[None, :])


@triton.jit
def _gather(
    packed, order, ends, out, places, stride,
    own: tl.constexpr, hidden: tl.constexpr, top_k: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    pair = tl.load(order + place)
    tl.store(places + pair, place.to(tl.int32))
    if place < tl.load(ends + own - 1):
        for start in tl.static_range(0, hidden, at_once):
            column = start + tl.arange(0, at_once)
            row = tl.load(packed + (pair // top_k) * stride + column, column < hidden, 0)
            tl.store(out + place * hidden + column, row, column < hidden)


@triton.jit
def _sum(
    found, places, packed, numbers, targets, arrived, expected, rows, stride,
    hidden: tl.constexpr, top_k: tl.constexpr, first: tl.constexpr, experts: tl.constexpr,
    ordered: tl.constexpr, at_once: tl.constexpr, group: tl.constexpr,
    own: tl.constexpr, ranks: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Of several ranks' rows each into the target of the rank whose it is."""
    wait(early)
    column = tl.program_id(1) * at_once + tl.arange(0, at_once)
    whose = tl.program_id(2)
    start = tl.program_id(0) * group
    for i in range(group):
        if start + i < rows:
            row = (whose * rows + start + i).to(tl.int64)
            total = tl.zeros([at_once], tl.float32)
            for k in tl.static_range(top_k):
                number = tl.load(numbers + row * stride + hidden + top_k + k)
                here = ((number > first) & (number <= first + experts)).to(tl.int32)
                place = row * top_k + k
                if ordered:
                    place = tl.load(places + place).to(tl.int64)
                weight = tl.load(packed + row * stride + hidden + k).to(tl.float32)
                total += weight * tl.load(found + place * hidden + column, column < hidden * here, 0).to(tl.float32)
            for rank in tl.static_range(ranks):
                if whose == rank:
                    target = targets[rank] + (own * rows + start + i).to(tl.int64) * hidden + column
                    tl.store(target, total.to(targets[rank].dtype.element_ty), column < hidden)
    if ranks > 1:
        first_block = (start == 0) & (tl.program_id(1) == 0) & (whose == 0)
        tl.atomic_add(expected + 1, rows * tl.num_programs(1), first_block)
        for rank in tl.static_range(ranks):
            if whose == rank:
                _signal(arrived[rank] + ranks + own, tl.minimum(group, rows - start))


@triton.jit
def _collect(
    sums, out, arrived, expected,
    hidden: tl.constexpr, at_once: tl.constexpr, ranks: tl.constexpr, early: tl.constexpr,
):  # fmt: skip
    """Each rank's share of this rank's rows, added up in the order of ranks."""
    wait(early)
    _await(arrived + ranks, tl.load(expected + 1), ranks)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * at_once + tl.arange(0, at_once)
    total = tl.zeros([at_once], tl.float32)
    for rank in tl.static_range(ranks):
        source = sums + (rank * tl.num_programs(0) + row) * hidden + column
        total += tl.load(source, column < hidden, 0).to(tl.float32)
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), column < hidden)
