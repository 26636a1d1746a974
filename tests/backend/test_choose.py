"""Which backend a model gets: asked for or not, on this machine or planned for another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spmd.backend.choose import choose_backend, default_block_size, exchange_bytes, make_backend, share_exchange_memory
from spmd.backend.kv_cache import KVCache
from spmd.model.architecture import Architecture, read_architecture
from spmd.model.decoder import Decoder
from spmd.parallel.peer_memory import size_of
from spmd.runtime.compose import CONF
from tests.support.checkpoints import write_checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")
elsewhere = pytest.mark.skipif(torch.cuda.is_available(), reason="plans for a machine with GPUs on one without")


def shape(name: str = "qwen3_8b", **changes: Any) -> Architecture:
    return replace(read_architecture(str(CONF / "shapes" / name)), **changes)


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_cpus_have_plain_pytorch(asked: str) -> None:
    assert choose_backend(asked, shape(), None, CPU) == "torch"
    with pytest.raises(ValueError) as raised:
        choose_backend("flashinfer", shape(), None, CPU)
    assert str(raised.value) == (
        "model.attention_backend=flashinfer: it needs a GPU, the device is cpu; use model.attention_backend=auto"
    )


@elsewhere
def test_gpus_of_another_machine_are_taken_to_have_flashinfer() -> None:
    assert [choose_backend(asked, shape(), None, GPU) for asked in ("auto", "flashinfer")] == ["flashinfer"] * 2
    assert choose_backend("torch", shape(), None, GPU) == "torch"


@elsewhere
@pytest.mark.parametrize(
    ("changes", "block_size", "reason"),
    [
        ({"dtype": torch.float32}, None, r"it computes in bfloat16 or float16, the model is torch\.float32"),
        ({"head_dim": 80}, 64, r"it takes heads of \(64, 128, 256\) dimensions, the model's have 80"),
        ({}, 24, r"it takes blocks of \(16, 32, 64, 128\) tokens, scheduler\.block_size is 24"),
    ],
)
def test_what_flashinfer_does_not_take(changes: dict[str, Any], block_size: int | None, reason: str) -> None:
    assert choose_backend("auto", shape(**changes), block_size, GPU) == "torch"
    with pytest.raises(ValueError, match=f"^model.attention_backend=flashinfer: {reason}; use model.attention"):
        choose_backend("flashinfer", shape(**changes), block_size, GPU)


def test_default_block_sizes_are_the_backends() -> None:
    assert (default_block_size("flashinfer"), default_block_size("torch")) == (64, 16)


def test_only_kernels_exchange_through_memory() -> None:
    moe = shape("qwen3_30b_a3b")
    assert exchange_bytes("flashinfer", moe, 2, 100) == size_of(2, 200, moe.hidden_size + 16, moe.hidden_size)
    assert exchange_bytes("flashinfer", moe, 1, 100) == 0
    assert exchange_bytes("torch", moe, 2, 100) == 0
    assert exchange_bytes("flashinfer", replace(moe, dtype=torch.float16), 2, 100) == 0
    assert share_exchange_memory("flashinfer", moe, None, 100, CPU) is None


@pytest.mark.parametrize(
    ("family", "longest", "capturable"),
    [("Qwen3ForCausalLM", 2048, True), ("Qwen3ForCausalLM", 2049, False), ("Qwen3MoeForCausalLM", 64, False)],
)
def test_what_a_graph_can_hold_of_plain_pytorch(tmp_path: Path, family: str, longest: int, capturable: bool) -> None:
    """Not experts, in no dtype: the host must know how many tokens each gets."""
    arch = read_architecture(write_checkpoint(tmp_path, family), "bfloat16")
    cache = KVCache([arch.cache_spec(layer) for layer in range(4)], 2, 16)
    assert make_backend("torch", Decoder(arch), cache, longest).capturable == capturable
