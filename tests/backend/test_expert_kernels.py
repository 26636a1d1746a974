"""The experts' Triton kernels against plain PyTorch in float32. With TRITON_INTERPRET=1 they need no GPU.

The interpreter multiplies in float16 only; grouped products of many rows take bfloat16 alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmd.backend.plain.experts import Routed
from spmd.parallel.peer_memory import MAX_DECODE_ROWS
from tests.support.triton_here import DEVICE, INTERPRETED, MARKS

pytestmark = MARKS
FEW_DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = 0.012  # of the norm


class Shape(NamedTuple):
    tokens: int
    padding: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    own: range


SHAPES = [
    Shape(1, 0, 256, 64, 8, 2, range(8)),
    Shape(5, 2, 128, 96, 16, 4, range(4, 12)),
    Shape(40, 4, 192, 80, 16, 8, range(8, 16)),  # more rows than a block has
]


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def expected(x: Tensor, routed: Routed, own: range, gate_up: Tensor, down: Tensor) -> Tensor:
    out = torch.zeros(len(x), down.shape[1], device=x.device)
    for i, expert in enumerate(own):
        for token, choice in (routed.experts == expert).nonzero().tolist():
            gate, up = F.linear(x[token].float(), gate_up[i].float()).chunk(2)
            out[token] += routed.weights[token, choice].float() * F.linear(F.silu(gate) * up, down[i].float())
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [False, True])
def test_choice_is_softmax_and_topk(shape: Shape, normalize: bool) -> None:
    from spmd.backend.cuda.expert_kernels import choose

    x = drawn(shape.tokens, shape.hidden, dtype=torch.bfloat16, seed=0)
    logits = torch.stack([torch.randperm(shape.experts) for _ in x]).to(DEVICE, torch.bfloat16) / 4  # without ties
    weights, experts = logits.softmax(dim=-1, dtype=torch.float32).topk(shape.top_k)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    packed = choose(x, logits, shape.tokens + shape.padding, shape.top_k, normalize)
    chosen = Routed.unpacked(packed, shape.top_k)
    assert torch.equal(chosen.x[: shape.tokens], x) and torch.equal(chosen.experts[: shape.tokens].long(), experts)
    torch.testing.assert_close(chosen.weights[: shape.tokens].float(), weights, rtol=2**-7, atol=1e-5)
    assert not chosen.x[shape.tokens :].any() and (chosen.experts[shape.tokens :] == -1).all()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_without_numbers_chooses_distinct_experts_and_stays_without(value: str, normalize: bool) -> None:
    """Chosen twice, an expert would have more rows than its list has places."""
    from spmd.backend.cuda.expert_kernels import choose

    x, count, top_k = torch.ones(3, 64, dtype=torch.bfloat16, device=DEVICE), 6, 4
    logits = torch.arange(3 * count, device=DEVICE).view(3, count).to(torch.bfloat16)
    whole = Routed.unpacked(choose(x, logits, 3, top_k, normalize), top_k)
    logits[0], logits[1, 2] = float(value), float("nan") if value == "-inf" else float(value)
    chosen = Routed.unpacked(choose(x, logits, 3, top_k, normalize), top_k)
    for row in chosen.experts.tolist():
        assert len(set(row)) == top_k and all(0 <= expert < count for expert in row)
    assert chosen.weights[:2].isnan().any(dim=1).all()
    assert torch.equal(chosen.weights[2], whole.weights[2]) and torch.equal(chosen.experts[2], whole.experts[2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("few", [True, False])
def test_this_ranks_share(shape: Shape, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the last own expert's hold whatever the memory held: here what no sum survives."""
    from spmd.backend.cuda import expert_kernels

    monkeypatch.setattr(expert_kernels, "MAX_DECODE_ROWS", MAX_DECODE_ROWS if few else 0)
    monkeypatch.setattr(F, "grouped_mm", poisoned(F.grouped_mm))
    dtype = FEW_DTYPE if few else torch.bfloat16
    x = drawn(shape.tokens, shape.hidden, dtype=dtype, seed=0)
    logits = drawn(shape.tokens, shape.experts, dtype=dtype, seed=1)
    gate_up = drawn(len(shape.own), 2 * shape.inner, shape.hidden, dtype=dtype, seed=2) / shape.hidden**0.5
    down = drawn(len(shape.own), shape.hidden, shape.inner, dtype=dtype, seed=3) / shape.inner**0.5
    packed = expert_kernels.choose(x, logits, shape.tokens + shape.padding, shape.top_k, True)
    exact = expected(x, Routed.unpacked(packed, shape.top_k), shape.own, gate_up, down)
    share = expert_kernels.mix(packed, shape.top_k, shape.own.start, gate_up, down)
    assert isinstance(share, Tensor)
    assert (share[: shape.tokens].float() - exact).norm() < TOLERANCE * exact.norm()
    assert not share[shape.tokens :].any()


def poisoned(grouped_mm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def product(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        out = grouped_mm(x, weight, offs=offs)
        out[offs[-1] :] = float("nan")
        return out

    return product
