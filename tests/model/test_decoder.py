"""Logits of our decoder against transformers', for every family and every way of cutting the work."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.backend import PlainBackend
from spmd.model.architecture import read_architecture
from spmd.model.batch import Batch, Span
from spmd.model.checkpoint import load
from spmd.model.decoder import Decoder
from spmd.model.linear import FBGEMM, FBGEMM_ENGINES, Dense, computed_in
from spmd.parallel.groups import join
from spmd.parallel.tensor import TensorParallel
from tests.support.checkpoints import FAMILIES, SCALINGS, write_checkpoint
from tests.support.ranks import Ranks

BLOCK = 4
PROMPTS = (37, 22, 9)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    **{f"rope_{name}": ("LlamaForCausalLM", {"rope_parameters": values}) for name, values in SCALINGS.items()},
    "llama_biased": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "mistral_window": ("MistralForCausalLM", {"sliding_window": 7}),
    "mixtral_window": ("MixtralForCausalLM", {"sliding_window": 7}),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3_wide_heads": ("Qwen3ForCausalLM", {"head_dim": 32, "num_key_value_heads": 1}),
    "qwen3_tied": ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3_moe_some_dense": (
        "Qwen3MoeForCausalLM",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True},
    ),
    "sharded": ("Qwen2ForCausalLM", {"shard": "100KB", "tie_word_embeddings": True}),
}


class Pipeline:
    """Stages run one after the other, and the requests' blocks, scattered over the pool."""

    def __init__(
        self, path: str, cuts: tuple[int, ...] = (), tp: TensorParallel | None = None, dtype: str = "auto"
    ) -> None:
        arch = read_architecture(path, dtype)
        edges = [0, *cuts, arch.num_layers]
        ranges = [range(first, stop) for first, stop in pairwise(edges)]
        self.stages = [
            Decoder(arch, layers, layers.start == 0, layers.stop == arch.num_layers, tp) for layers in ranges
        ]
        size = self.stages[0].tp.size
        caches = [KVCache([arch.cache_spec(layer, size) for layer in layers], 64, BLOCK) for layers in ranges]
        self.backends = [PlainBackend(arch, *parts, size) for parts in zip(ranges, caches, strict=True)]
        for stage in self.stages:
            load(stage, path)
        scattered = torch.randperm(63, generator=torch.Generator().manual_seed(1)) + 1
        self.tables = torch.cat([scattered[:60].view(4, 15), torch.zeros(1, 15, dtype=torch.long)])

    def run(
        self, chunks: list[tuple[int, int, Tensor]], decodes: Sequence[tuple[int, int, int]] = (), pad: int = 0
    ) -> Tensor | None:
        """Logits of decodes (request, position, token), then of prompt chunks (request, start, tokens)."""
        padded = [*decodes, *[(len(self.tables) - 1, 0, 0)] * pad]
        seats, positions, tokens = [torch.tensor(column, dtype=torch.long) for column in zip(*padded, strict=True)] or [
            torch.zeros(0, dtype=torch.long)
        ] * 3
        spans, widths = list[Span](), [position // BLOCK + 1 for _, position, _ in padded]
        for request, start, chunk in chunks:
            spans.append(Span(len(tokens), len(chunk), start + len(chunk), request))
            tokens = torch.cat([tokens, chunk])
            positions = torch.cat([positions, torch.arange(start, start + len(chunk))])
            seats = torch.cat([seats, torch.full_like(chunk, request)])
        sampled = torch.tensor([*range(len(decodes)), *range(len(padded), len(tokens))])
        batch = Batch(positions, seats, self.tables, widths, spans, sampled)
        x = tokens
        for stage, backend in zip(self.stages, self.backends, strict=True):
            x = stage(x, batch, backend)
        assert stage.lm_head is not None
        return stage.lm_head.gather(x)


@cache
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 128, (length,), generator=generator) for length in PROMPTS]


@torch.inference_mode()
def reference(path: str) -> list[Tensor]:
    """transformers' logits of each prompt, `[tokens, vocab]`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return [model(prompt[None]).logits[0] for prompt in prompts()]


def in_all_ways(pipeline: Pipeline, expected: list[Tensor]) -> None:
    """Whole prompts at once; chunks; then single tokens among chunks; each must give the same logits,
    on tp rank 0 alone."""

    def check(actual: Tensor | None, *parts: Tensor) -> None:
        if pipeline.stages[0].tp.rank > 0:
            assert actual is None
            return
        torch.testing.assert_close(actual, torch.cat(parts), rtol=1e-4, atol=2e-5)

    a, b, c = prompts()
    check(pipeline.run([(0, 0, a), (1, 0, b), (2, 0, c)]), *expected)
    check(pipeline.run([(0, 0, a[:10]), (1, 0, b[:21])]), expected[0][:10], expected[1][:21])
    check(pipeline.run([(0, 10, a[10:31]), (2, 0, c[:7])]), expected[0][10:31], expected[2][:7])
    check(pipeline.run([(0, 31, a[31:36])], [(1, 21, int(b[21]))]), expected[1][21:], expected[0][31:36])
    check(
        pipeline.run([], [(0, 36, int(a[36])), (2, 7, int(c[7]))], pad=2),
        expected[0][36:37],
        expected[2][7:8],
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    path = write_checkpoint(tmp_path, family, **overrides)
    in_all_ways(Pipeline(path), reference(path))


@pytest.mark.parametrize("variant", ["qwen3_tied", "mistral_window", "MixtralForCausalLM", "sharded"])
def test_chained_stages_equal_one(tmp_path: Path, variant: str) -> None:
    family, overrides = VARIANTS[variant]
    path = write_checkpoint(tmp_path, family, **overrides)
    in_all_ways(Pipeline(path, cuts=(1, 3)), reference(path))


def test_stage_holds_only_its_share(tmp_path: Path) -> None:
    arch = read_architecture(write_checkpoint(tmp_path, "Qwen3ForCausalLM"))
    middle = Decoder(arch, range(1, 3), False, False, TensorParallel(0, 2))
    assert middle.embed_tokens is None and middle.norm is None and middle.lm_head is None
    whole = Decoder(arch)
    share = sum(p.numel() for p in middle.parameters()) / sum(p.numel() for p in whole.layers.parameters())
    assert 0.25 <= share < 0.26  # half the layers, half of each but for the norms


def test_long_chunk_is_cut_into_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.backend.plain.attention.QUERY_TILE", 8)
    path = write_checkpoint(tmp_path, "MistralForCausalLM", sliding_window=11)
    in_all_ways(Pipeline(path), reference(path))


@pytest.mark.parametrize("variant", ["Qwen3ForCausalLM", "mistral_window"])
def test_decodes_of_unlike_lengths_are_read_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    family, overrides = VARIANTS[variant]
    path = write_checkpoint(tmp_path, family, **overrides)
    monkeypatch.setattr("spmd.backend.plain.decode.WORTH", 10**9)
    pipeline, expected = Pipeline(path), reference(path)
    in_all_ways(pipeline, expected)
    order = [(2, 8), (0, 36), (1, 5)]
    pipeline.run([(request, 0, prompts()[request][:at]) for request, at in order])
    found = pipeline.run([], [(request, at, int(prompts()[request][at])) for request, at in order], pad=1)
    plan = pipeline.backends[0].plan.decodes
    assert plan and len(plan.groups) == 3 and plan.order is not None
    torch.testing.assert_close(
        found, torch.stack([expected[request][at] for request, at in order]), rtol=1e-4, atol=2e-5
    )


def round_to(pipeline: Pipeline, dtype: torch.dtype) -> None:
    """Give the first stage's weights values that a checkpoint in `dtype` can have."""
    for weight in pipeline.stages[0].parameters():
        weight.copy_(weight.to(dtype))


@pytest.mark.parametrize(
    ("stored", "dtype", "tolerance"),
    [("float32", "bfloat16", 0.1), ("float32", "float32", 1e-4), ("bfloat16", "float32", 1e-4)],
)
def test_packed_equals_dense(tmp_path: Path, stored: str, dtype: str, tolerance: float) -> None:
    model: dict[str, Any] = {"tie_word_embeddings": True, "mlp_only_layers": [0], "attention_bias": True}
    path = write_checkpoint(tmp_path, "Qwen3MoeForCausalLM", **model)
    pipeline = Pipeline(path, dtype=dtype)
    round_to(pipeline, getattr(torch, stored))
    chunks = [(i, 0, prompt) for i, prompt in enumerate(prompts())]
    dense = pipeline.run(chunks)
    pipeline.stages[0].pack(8)
    embedding = pipeline.stages[0].embed_tokens
    assert embedding is not None
    assert embedding.weight.values.dtype == getattr(torch, dtype)
    torch.testing.assert_close(pipeline.run(chunks), dense, rtol=tolerance / 2, atol=tolerance)


@pytest.mark.skipif(torch.backends.quantized.engine not in FBGEMM_ENGINES, reason="needs FBGEMM (x86)")
@pytest.mark.parametrize(("value", "fits"), [(0.1, False), (1e5, False), (float("nan"), False), (1e-9, True)])
def test_only_what_float16_holds_is_packed_in_it(value: float, fits: bool) -> None:
    weight = Dense(torch.float32, 8, 16)
    weight.values.copy_(torch.randn(8, 16).bfloat16())
    assert isinstance(weight.packed(8), FBGEMM)
    weight.values[3, 5] = value
    assert isinstance(weight.packed(8), FBGEMM) == fits


def test_cpus_without_a_dtype_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.model.linear._multiplies", lambda dtype: dtype != torch.bfloat16)
    assert computed_in(torch.bfloat16, "cpu") == torch.float32
    assert computed_in(torch.float16, "cpu") == torch.float16
    assert computed_in(torch.bfloat16, "cuda") == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batch_that_samples_nothing(tmp_path: Path, dtype: str) -> None:
    pipeline = Pipeline(write_checkpoint(tmp_path, "LlamaForCausalLM"), dtype=dtype)
    round_to(pipeline, torch.bfloat16)
    pipeline.stages[0].pack(8)
    null, none = torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    batch = Batch(null, null + len(pipeline.tables) - 1, pipeline.tables, [1], [], none)
    assert pipeline.stages[0](null, batch, pipeline.backends[0]).shape == (0, 128)


def tensor_parallel_rank(rank: int, paths: list[str]) -> None:
    join()
    for path in paths:
        pipeline = Pipeline(path, cuts=(2,), tp=TensorParallel(rank, 2, dist.group.WORLD))
        in_all_ways(pipeline, torch.load(f"{path}/expected.pt"))


def test_two_tensor_parallel_ranks_equal_one(ranks: Ranks, tmp_path: Path) -> None:
    paths = []
    for variant in ("llama_biased", "qwen3_tied", "qwen3_moe_some_dense"):
        family, overrides = VARIANTS[variant]
        # An odd vocabulary is padded.
        path = write_checkpoint(tmp_path / variant, family, **overrides | {"vocab_size": 129})
        torch.save(reference(path), f"{path}/expected.pt")
        paths.append(path)
    ranks.run(2, tensor_parallel_rank, paths)
