"""Logits in bfloat16, of every backend and by CUDA graph, against those of plain PyTorch in float32.

Each runs the same script of plans, made by the real scheduler: prompts whole and in chunks, with and without decodes
beside them, then decodes alone, full batches and padded ones. Which tokens are sampled is fixed beforehand.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from spmd.backend.cuda.limits import why_not
from spmd.config import Config, ModelConfig, SchedulerConfig
from spmd.model.architecture import Architecture, GroupedQuery, LayerSpec
from spmd.model.decoder import Decoder
from spmd.model.rope import RopeConfig
from spmd.parallel.groups import Groups
from spmd.schedule.plan import Plan
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams
from spmd.stage.build import build_stage
from spmd.topology import Topology
from spmd.worker import build_scheduler
from tests.support.settings import settled

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
LENGTHS = [(37, 22), (150, 9), (9, 19), (64, 7), (200, 12), (1, 16)]  # prompt and output tokens of each request
NUM_BLOCKS = 64
TOLERANCE = 0.02  # of the norm; rounding to bfloat16 makes 0.011 to 0.013, a window one token too wide over 0.04
KINDS = {"prompts", "mixed", "decodes", "padded decodes"}

BACKENDS: dict[str, tuple[str, bool, list[int]]] = {  # attention_backend, enforce_eager, mixed_buckets
    "torch": ("torch", True, []),
    "torch_padded": ("torch", True, [8, 96]),
    "torch_graphs": ("torch", False, []),
    "flashinfer": ("flashinfer", True, []),
    "flashinfer_padded": ("flashinfer", True, [8, 96]),
    "flashinfer_graphs": ("flashinfer", False, []),
    "flashinfer_mixed_graphs": ("flashinfer", False, [8, 48, 96]),
}
gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")]
everywhere = pytest.mark.parametrize(
    "backend",
    [name if name == "torch" else pytest.param(name, marks=gpu) for name in BACKENDS if name != "torch_padded"],
)


def shape(head_dim: int, window: int | None, qk_norm: bool, bias: bool = False) -> Architecture:
    return Architecture(
        family="tested",
        stored=torch.bfloat16,
        dtype=torch.bfloat16,
        vocab_size=1000,
        hidden_size=512,
        layers=(LayerSpec(), LayerSpec(GroupedQuery(window))),
        num_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        intermediate_size=1024,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope=RopeConfig(),
        qkv_bias=bias,
        qk_norm=qk_norm,
    )


@torch.no_grad()
def decoders(arch: Architecture) -> tuple[Decoder, Decoder]:
    """The same weights in `arch.dtype` and in float32, large enough that attention is far from even."""
    narrow, wide = Decoder(arch, device=DEVICE), Decoder(replace(arch, dtype=torch.float32), device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    for (name, ours), exact in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        drawn = torch.randn(ours.shape, generator=generator)
        ours.copy_(1 + 0.2 * drawn if "norm" in name else drawn / ours.shape[-1] ** 0.5)
        exact.copy_(ours)
    return narrow, wide


def configured(backend: str, block_size: int) -> Config:
    attention_backend, enforce_eager, mixed_buckets = BACKENDS[backend]
    return Config(
        model=ModelConfig(attention_backend=attention_backend, enforce_eager=enforce_eager),
        scheduler=SchedulerConfig(
            max_num_seqs=6,
            max_num_batched_tokens=96,
            block_size=block_size,
            decode_buckets=[4],
            lookahead=0,
            mixed_buckets=mixed_buckets,
        ),
    )


def run(decoder: Decoder, backend: str, block_size: int, alone: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The kind of each plan of the script, and the logits it gives, `[S, vocab]`.

    `alone`: all requests are computed alone, in a cache that is full of NaN at first.
    """
    config = configured(backend, block_size)
    settings = settled(config, decoder.arch, DEVICE.type, NUM_BLOCKS)
    stage = build_stage(settings, decoder, Topology(), Groups(), DEVICE)
    assert sorted(stage.forward.graphs) == ([] if config.model.enforce_eager else [4, 6])
    assert sorted(stage.forward.mixed) == (BACKENDS[backend][2] if backend.endswith("mixed_graphs") else [])
    scheduler = build_scheduler(settings)
    for index, (prompt_len, max_tokens) in enumerate(LENGTHS):
        prompt = [token_at(index, position) for position in range(prompt_len)]
        scheduler.add(Request(index, 0, Prompt(prompt), SamplingParams(max_tokens=max_tokens), alone=alone))
    if alone:
        stage.cache.keys.fill_(float("nan"))
        stage.cache.values.fill_(float("nan"))
    for tick in count():
        plan = scheduler.schedule(tick)
        if not plan.requests:
            break
        if plan.cleared:
            stage.cache.clear(plan.cleared)
        logits = stage.forward(*stage.inputs.build(plan))
        yield kind(plan), logits[: len(plan.sampled)].to(torch.float32, copy=True)
        sampled = list(zip(plan.sampled, plan.sample_positions, strict=True))
        tokens = [token_at(request.index, position) for request, position in sampled]
        scheduler.commit(plan, tokens, [position == request.full_length for request, position in sampled])


def token_at(index: int, position: int) -> int:
    return (311 * index + 7 * position * position + position) % 1000


def kind(plan: Plan) -> str:
    if plan.num_prompt_tokens:
        return "mixed" if plan.num_decodes else "prompts"
    return "decodes" if plan.num_decodes == plan.padded_decodes else "padded decodes"


def compare(arch: Architecture, backend: str, block_size: int = 16, alone: bool = False) -> None:
    if backend.startswith("flashinfer") and (reason := why_not(arch, block_size, DEVICE)):
        pytest.skip(reason)
    narrow, wide = decoders(arch)
    logits, expected = by_kind(run(narrow, backend, block_size, alone)), by_kind(run(wide, "torch", block_size))
    assert logits.keys() == expected.keys() == KINDS
    errors = {what: float((logits[what] - expected[what]).norm() / expected[what].norm()) for what in KINDS}
    assert max(errors.values()) < TOLERANCE, errors


def by_kind(found: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """All logits of each kind of plan, `[rows, vocab]`."""
    listed: dict[str, list[Tensor]] = {}
    for what, logits in found:
        listed.setdefault(what, []).append(logits)
    return {what: torch.cat(parts) for what, parts in listed.items()}


@everywhere
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits(head_dim: int, window: int | None, qk_norm: bool, backend: str) -> None:
    compare(shape(head_dim, window, qk_norm), backend)


@everywhere
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("window", [None, 24])
def test_rows_that_are_computed_alone_read_nothing_of_others(window: int | None, block_size: int, backend: str) -> None:
    """Neither what stands in any other block, the null block included, nor what stood in theirs: all of it is NaN."""
    compare(shape(128, window, True), backend, block_size, alone=True)


@pytest.mark.parametrize("backend", [pytest.param("flashinfer_graphs", marks=gpu)])
def test_rows_that_are_computed_alone_in_wide_batches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spmd.backend.cuda.flashinfer.MIN_WIDE_ROWS_TIMES_HEADS", 1)
    compare(shape(128, None, True), backend, block_size=64, alone=True)


@pytest.mark.parametrize("backend", [pytest.param("flashinfer_graphs", marks=gpu)])
def test_logits_of_wide_batches(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that count as wide from the first row on."""
    monkeypatch.setattr("spmd.backend.cuda.flashinfer.MIN_WIDE_ROWS_TIMES_HEADS", 1)
    compare(shape(128, None, True), backend, block_size=64)


@pytest.mark.parametrize("alone", [False, True])
def test_logits_with_padding_behind_prompts(alone: bool) -> None:
    compare(shape(64, 24, True), "torch_padded", alone=alone)


@pytest.mark.parametrize("backend", [pytest.param("flashinfer_mixed_graphs", marks=gpu)])
def test_mixed_graphs_give_the_logits_of_the_same_padding_without_graphs(backend: str) -> None:
    narrow, _ = decoders(shape(128, 24, True))
    by_graphs, one_by_one = by_kind(run(narrow, backend, 64)), by_kind(run(narrow, "flashinfer_padded", 64))
    for what in ("prompts", "mixed"):
        torch.testing.assert_close(by_graphs[what], one_by_one[what], rtol=0.02, atol=0.02)


@everywhere
def test_logits_with_biases_and_large_blocks(backend: str) -> None:
    compare(shape(128, None, True, bias=True), backend, block_size=64)


@pytest.mark.parametrize("backend", [pytest.param("flashinfer_graphs", marks=gpu)])
def test_logits_with_products_of_our_own(backend: str) -> None:
    """A model wide enough for them."""
    arch = shape(128, None, True)
    arch = replace(arch, hidden_size=2048, num_heads=32, num_kv_heads=8, intermediate_size=4096)
    compare(arch, backend, block_size=64)
