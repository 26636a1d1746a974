"""Experts in bfloat16 against float32: one by one on CPUs, in grouped products on GPUs, where a graph can hold them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from spmd.model.architecture import Architecture
from spmd.model.backend import TorchBackend
from spmd.model.kv_cache import KVCache
from spmd.model.moe import Experts
from spmd.model.rope import RopeConfig
from spmd.parallel.tensor import TensorParallel

NUM_EXPERTS, TOP_K, HIDDEN = 16, 4, 128
ARCH = Architecture(
    family="tested",
    dtype=torch.bfloat16,
    vocab_size=8,
    hidden_size=HIDDEN,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=96,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    rope=RopeConfig(),
    windows=(None,),
    sparse=(True,),
    num_experts=NUM_EXPERTS,
    experts_per_token=TOP_K,
    moe_intermediate_size=96,
)
TOLERANCE = 0.01  # of the norm
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])


class Layer:
    """Experts with random weights and the backend they compute with."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        arch = replace(ARCH, dtype=dtype)
        self.backend = TorchBackend(arch, range(1), KVCache(arch, 1, 2, 16, device=device))
        self.experts = Experts(arch, TensorParallel()).to(device)
        generator = torch.Generator().manual_seed(0)
        for weight in self.experts.parameters():
            drawn = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
            weight.data.copy_(drawn.to(torch.bfloat16))

    def __call__(self, work: SimpleNamespace) -> Tensor:
        return self.experts(work.x, work.weights, work.chosen, self.backend)


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
@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("choice", ["any", "few", "same"])
def test_bfloat16_equals_float32(device: str, choice: str, tokens: int) -> None:
    exact = Layer("cpu", torch.float32)(work(choice, tokens, "cpu", torch.float32))
    assert distance(Layer(device)(work(choice, tokens, device)), exact) < TOLERANCE


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
