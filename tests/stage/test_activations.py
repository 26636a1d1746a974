"""The estimate of what a forward takes, against the tensors alive in real ones."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.backend import PlainBackend
from spmd.config import Config, ModelConfig, SchedulerConfig, TopologyConfig
from spmd.model.architecture import Architecture, read_architecture
from spmd.model.batch import Batch
from spmd.model.decoder import Decoder
from spmd.runtime.compose import CONF
from spmd.sampling.sampler import Sampler
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams
from spmd.stage.activations import SAMPLING_BYTES, activation_bytes
from spmd.stage.inputs import InputBuilder
from tests.support.settings import settled


class Peak(TorchDispatchMode):
    """Bytes of the tensors made within it that were alive at once."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's; `untyped_calls_exclude` knows no `super()`
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.seen:
            return
        self.seen.add(place)
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.alive -= size


def shape(name: str, **changes: Any) -> Architecture:
    arch = replace(read_architecture(str(CONF / "shapes" / name)), **changes)
    return replace(arch, layers=arch.layers[:2])


def configured(rows: int, longest: int = 1024, **topology: Any) -> Config:
    scheduler = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=rows)
    return Config(ModelConfig(max_model_len=longest), TopologyConfig(**topology), scheduler, device="cpu")


def forward_peak(arch: Architecture, rows: int, last: bool) -> int:
    """Of a prompt of so many tokens, of which eight are sampled on the last stage; with the buffers that are kept."""
    decoder = Decoder(arch, last=last)
    for parameter in decoder.parameters():
        parameter.fill_(0.01)
    cache = KVCache([arch.cache_spec(layer) for layer in decoder.range], rows // 16 + 2, 16)
    inputs = InputBuilder(8, rows // 16 + 2, rows, 16, torch.device("cpu"))
    backend = PlainBackend(arch, decoder.range, cache, 1, rows)
    ids, batch = inputs.padding(0, rows)
    batch = replace(batch, sample_rows=torch.arange(8))
    peak = Peak(*decoder.parameters(), cache.keys, cache.values, inputs.tables)
    with torch.inference_mode(), peak:
        x = decoder(ids, batch, backend)
        if last:
            params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1)
            requests = [Request(i, 0, Prompt([1, 2]), params) for i in range(8)]
            Sampler(arch.vocab_size, "cpu").sample(x, requests, [2] * 8)
    return peak.most + sum(buffer.nbytes for buffer in backend.gather.buffers)


@pytest.mark.parametrize(
    ("arch", "rows", "last"),
    [
        (lambda: shape("small"), 128, False),
        (lambda: shape("small"), 1024, False),
        (lambda: shape("small"), 16, True),
        (lambda: shape("tiny"), 512, True),
        (lambda: shape("qwen3_30b_a3b", num_experts=8), 128, False),
    ],
    ids=["small 128", "small 1024", "small head", "tiny 512", "moe"],
)
def test_a_forward_takes_no_more_and_at_least_half(arch: Callable[[], Architecture], rows: int, last: bool) -> None:
    estimate = activation_bytes(settled(configured(rows, rows), arch()), last)
    assert estimate / 2 <= forward_peak(arch(), rows, last) <= estimate


@pytest.mark.parametrize("longest", [64, 1024, 4096])
def test_decodes_of_any_lengths_take_no_more(longest: int) -> None:
    """Their keys and values, side by side, and the scores."""
    arch, rows = shape("small"), 8
    decoder = Decoder(arch, last=False)
    for parameter in decoder.parameters():
        parameter.fill_(0.01)
    cache = KVCache([arch.cache_spec(layer) for layer in decoder.range], 2, 16)
    positions = torch.tensor([longest - 1] + [longest // 2] * (rows - 1))
    tables = torch.ones(rows + 1, longest // 16, dtype=torch.int32)
    batch = Batch(positions, torch.arange(rows), tables, [int(at) // 16 + 1 for at in positions], [], None)
    backend = PlainBackend(arch, decoder.range, cache, 1, longest)
    peak = Peak(*decoder.parameters(), cache.keys, cache.values, tables, *backend.gather.buffers)
    with torch.inference_mode(), peak:
        decoder(torch.zeros(rows, dtype=torch.int64), batch, backend)
    kept = sum(buffer.nbytes for buffer in backend.gather.buffers)
    assert kept < peak.most + kept <= activation_bytes(settled(configured(rows, longest), arch), last=False)


def test_no_sampling_takes_more_bytes_a_logit() -> None:
    vocab, rows = 5000, 16
    for values in ({"top_p": 0.9}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 5}):
        params = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, **values)
        with Peak() as peak:
            requests = [Request(i, 0, Prompt([1, 2]), params) for i in range(rows)]
            Sampler(vocab, "cpu").sample(torch.randn(rows, vocab).bfloat16(), requests, [2] * rows)
        assert peak.most <= (SAMPLING_BYTES + 3) * rows * vocab  # 2 of these are the logits


def on_gpus(arch: Architecture, config: Config, last: bool = False) -> int:
    return activation_bytes(settled(config, arch, "cuda"), last)


def test_what_is_kept_on_gpus_counts() -> None:
    arch = shape("small")
    alone = on_gpus(arch, configured(1024))
    assert on_gpus(arch, configured(1024, pp=2)) > alone
    assert on_gpus(arch, configured(1024), last=True) > alone
    eager = replace(configured(1024), model=ModelConfig(max_model_len=1024, enforce_eager=True))
    assert on_gpus(arch, eager) < alone
    moe = shape("qwen3_30b_a3b")
    apart = on_gpus(moe, configured(8192, dp=4))
    assert on_gpus(moe, configured(8192, dp=4, ep=True)) > 2 * apart
