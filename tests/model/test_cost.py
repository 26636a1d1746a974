"""Costs from shapes, against the tensors they stand for and sums done the long way."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from spmd.backend.kv_cache import KVCache
from spmd.model.architecture import Architecture, read_architecture
from spmd.model.cache_spec import block_bytes
from spmd.model.cost import (
    SAMPLING_READS,
    head_cost,
    head_params,
    layer_bytes,
    layer_params,
    seen,
    touched_experts,
)
from spmd.model.decoder import Decoder
from spmd.runtime.compose import CONF
from spmd.topology import split_layers
from tests.support.checkpoints import FAMILIES, OF_FAMILY, SHAPE


def architecture(folder: Path, family: str, **overrides: Any) -> Architecture:
    values = SHAPE | OF_FAMILY.get(family, {}) | overrides
    config = getattr(transformers, family.replace("ForCausalLM", "Config"))
    config(architectures=[family], **values).save_pretrained(folder)
    return read_architecture(str(folder))


def shape(name: str) -> Architecture:
    return read_architecture(str(CONF / "shapes" / name))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_decoder(tmp_path: Path, family: str) -> None:
    arch = architecture(tmp_path, family, tie_word_embeddings=False)
    decoder = Decoder(arch, device="meta")
    for layer, module in enumerate(decoder.layers.values()):
        assert layer_params(arch, layer) == sum(p.numel() for p in module.parameters())
        assert layer_bytes(arch, layer) == sum(p.nbytes for p in module.parameters())
    assert decoder.norm is not None and decoder.lm_head is not None
    head = [p for part in (decoder.norm, decoder.lm_head) for p in part.parameters()]
    assert head_params(arch) == sum(p.numel() for p in head)


def test_biases_count(tmp_path: Path) -> None:
    arch = architecture(tmp_path, "LlamaForCausalLM", attention_bias=True, mlp_bias=True)
    layer = Decoder(arch, device="meta").layers["0"]
    assert layer_params(arch, 0) == sum(p.numel() for p in layer.parameters())


def test_a_sparse_layer_is_read_as_far_as_its_experts_are(tmp_path: Path) -> None:
    arch = architecture(tmp_path, "Qwen3MoeForCausalLM")
    expert = 3 * arch.hidden_size * arch.moe_intermediate_size
    assert layer_params(arch, 0) - layer_params(arch, 0, experts=1.5) == 2.5 * expert


def test_touched_experts_are_the_mean_of_even_routing() -> None:
    arch = shape("qwen3_30b_a3b")
    torch.manual_seed(0)
    for rows in (1, 8, 64):
        chosen = torch.rand(500, rows, arch.num_experts).topk(arch.experts_per_token).indices.flatten(1)
        drawn = sum(len(each.unique()) for each in chosen) / 500
        assert touched_experts(arch, rows) == pytest.approx(drawn, rel=0.01)
    assert touched_experts(shape("small"), 8) == 0


def test_bytes_of_a_token_are_the_caches() -> None:
    for arch in map(shape, ("small", "tiny")):
        specs = [arch.cache_spec(layer) for layer in range(3)]
        cache = KVCache(specs, 5, block_size=16)
        assert (
            16 * 3 * arch.cache_spec(0).token_bytes
            == block_bytes(specs, 16)
            == (cache.keys.nbytes + cache.values.nbytes) // 5
        )


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 50])
@pytest.mark.parametrize("tokens", [0, 1, 7, 20])
def test_seen_is_the_sum_over_the_queries(window: int | None, tokens: int) -> None:
    assert seen(window, tokens) == sum(min(place, window or place) for place in range(1, tokens + 1))


@pytest.mark.parametrize(
    ("name", "rows", "cost", "counts"),
    [
        ("qwen3_8b", 64, 1.90, [19, 17]),
        ("small", 8, 1.01, [6, 6]),  # 7, 5 would be faster by a hundredth of a layer
        ("tiny", 8, 0.19, [4, 4]),
        ("qwen3_30b_a3b", 64, 0.46, [24, 24]),
    ],
)
def test_the_head_is_weighed_in_layers(name: str, rows: int, cost: float, counts: list[int]) -> None:
    arch = shape(name)
    assert head_cost(arch, rows) == pytest.approx(cost, abs=0.01)
    assert split_layers(arch.num_layers, 2, head_cost=head_cost(arch, rows)) == counts


def test_drawing_tokens_weighs_as_much_as_some_reads_of_their_logits() -> None:
    arch, rows = shape("qwen3_8b"), 64
    drawing = head_cost(arch, rows, drawn=True) / head_cost(arch, rows) - 1
    assert drawing == pytest.approx(SAMPLING_READS * rows * arch.vocab_size / head_params(arch))
    assert 0.1 < head_cost(arch, rows, drawn=True) - head_cost(arch, rows) < 0.4  # 60 us of a layer's 160, on one H200
