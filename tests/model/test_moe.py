"""Experts in bfloat16 against float32: one by one on CPUs, by kernels on GPUs, where a graph can hold them.

Whole, and spread over ranks: then each rank adds its share, and nothing of what it doesn't own.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.backend import PlainBackend
from spmd.backend.plain.experts import Routed
from spmd.model.architecture import SPARSE_MLP, Architecture, LayerSpec
from spmd.model.backend import ExpertLayer
from spmd.model.linear import Dense
from spmd.model.moe import Experts
from spmd.model.rope import RopeConfig
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel

NUM_EXPERTS, TOP_K, HIDDEN = 16, 4, 128
ARCH = Architecture(
    family="tested",
    stored=torch.bfloat16,
    dtype=torch.bfloat16,
    vocab_size=8,
    hidden_size=HIDDEN,
    layers=(LayerSpec(mlp=SPARSE_MLP),),
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=96,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    rope=RopeConfig(),
    num_experts=NUM_EXPERTS,
    experts_per_token=TOP_K,
    moe_intermediate_size=96,
)
TOLERANCE = 0.01  # of the norm
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])


class Layer:
    """Experts with random weights and the backend they compute with."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16, rank: int = 0, size: int = 1) -> None:
        arch = replace(ARCH, dtype=dtype)
        self.ep = ExpertParallel(rank, size)
        self.backend = PlainBackend(arch, range(1), KVCache([arch.cache_spec(0)], 2, 16, device=device))
        self.experts = Experts(arch, TensorParallel(), self.ep).to(device)
        generator = torch.Generator().manual_seed(0)
        for weight in self.experts.parameters():
            drawn = torch.randn(NUM_EXPERTS, *weight.shape[1:], generator=generator) / weight.shape[-1] ** 0.5
            weight.data.copy_(drawn[self.experts.owned.start : self.experts.owned.stop].to(torch.bfloat16))

    def __call__(self, work: SimpleNamespace) -> Tensor:
        routed = Routed(work.x, work.weights, work.chosen)
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        assert isinstance(gate_up, Dense) and isinstance(down, Dense)
        if not work.x.is_cuda:
            return self.backend.experts.share(routed, ExpertLayer(NUM_EXPERTS, TOP_K, True, gate_up, down, self.ep))
        from spmd.backend.cuda.expert_kernels import mix

        sums = mix(routed.packed(), TOP_K, self.experts.owned.start, gate_up.values, down.values)
        assert isinstance(sums, Tensor)
        return sums


def work(choice: str, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> SimpleNamespace:
    """Hidden states, and the experts of each token with their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    weights = torch.rand(tokens, TOP_K, generator=generator).to(torch.bfloat16)
    scores = torch.rand(tokens, NUM_EXPERTS, generator=generator)
    if choice == "few":  # most experts get nothing
        scores[:, 1 : NUM_EXPERTS - TOP_K + 1] -= 1.0
    if choice == "same":
        scores += torch.arange(NUM_EXPERTS)
    chosen = scores.topk(TOP_K).indices
    return SimpleNamespace(x=x.to(device, dtype), weights=weights.to(device, dtype), chosen=chosen.to(device))


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float().cpu() - expected).norm() / expected.norm())


@devices
@pytest.mark.parametrize("tokens", [1, 7, 100, 300])
@pytest.mark.parametrize("choice", ["any", "few", "same"])
def test_bfloat16_equals_float32(device: str, choice: str, tokens: int) -> None:
    exact = Layer("cpu", torch.float32)(work(choice, tokens, "cpu", torch.float32))
    assert distance(Layer(device)(work(choice, tokens, device)), exact) < TOLERANCE


@devices
@pytest.mark.parametrize("choice", ["any", "few", "same"])
def test_shares_of_the_ranks_add_up(device: str, choice: str) -> None:
    given = work(choice, 30, device)
    given.chosen[7] = -1  # padding
    exact = Layer("cpu", torch.float32)(work(choice, 30, "cpu", torch.float32))
    shares = [Layer(device, rank=rank, size=4)(given).float().cpu() for rank in range(4)]
    assert not any(share[7].any() for share in shares)
    exact[7] = 0
    assert distance(torch.stack(shares).sum(0), exact) < TOLERANCE


def test_what_travels_arrives() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        chosen = torch.tensor([[0, 1], [300, 32766]])
        sent = Routed(torch.randn(2, 8).to(dtype), torch.rand(2, 2).to(dtype), chosen)
        x, weights, experts = Routed.unpacked(F.pad(sent.packed(), (0, 0, 0, 1)), top_k=2)
        assert torch.equal(x[:2], sent.x) and torch.equal(weights[:2], sent.weights)
        assert experts.tolist() == [*chosen.tolist(), [-1, -1]]


@pytest.mark.gpu
@needs_gpu
@torch.inference_mode()
def test_a_graph_holds_any_choice_of_experts() -> None:
    layer, held = Layer("cuda"), work("any", 24, "cuda")
    layer(held)  # what is chosen or loaded at first use must not be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = layer(held)
    for seed, choice in enumerate(["same", "few", "any"]):
        given = work(choice, 24, "cuda", seed=seed)
        for name, tensor in vars(given).items():
            getattr(held, name).copy_(tensor)
        graph.replay()
        torch.testing.assert_close(output, layer(given), rtol=0, atol=0)
