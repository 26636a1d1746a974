"""config.json, old and new, to Architecture; and the errors a user can cause."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from spmd.model.architecture import Architecture, check_topology, read_architecture
from spmd.model.rope import RopeConfig
from spmd.topology import Topology
from tests.support.checkpoints import FAMILIES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 129,
    "torch_dtype": "bfloat16",
}


def read(folder: Path, values: dict[str, Any], **arguments: Any) -> Architecture:
    (folder / "config.json").write_text(json.dumps(values))
    return read_architecture(str(folder), **arguments)


def test_config_of_transformers_4(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    arch = read(tmp_path, LLAMA | {"rope_theta": 500000.0, "rope_scaling": scaling})
    assert arch.rope == RopeConfig(500000.0, "llama3", 8.0, 8192, 1.0, 4.0)
    assert (arch.dtype, arch.head_dim, arch.num_kv_heads) == (torch.bfloat16, 8, 4)
    assert arch.windows == (None,) * 4 and arch.sparse == (False,) * 4


def test_oldest_key_of_the_rope_type(tmp_path: Path) -> None:
    arch = read(tmp_path, LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert arch.rope == RopeConfig(10000.0, "linear", 2.0)


def test_dtype_and_overrides(tmp_path: Path) -> None:
    values = Qwen3Config(num_hidden_layers=6).to_dict() | {"architectures": ["Qwen3ForCausalLM"]}
    overrides = {"num_hidden_layers": 2, "hidden_size": 32}
    arch = read(tmp_path, values, dtype="float16", overrides=overrides)
    assert (arch.num_layers, len(arch.windows), arch.hidden_size, arch.dtype) == (2, 2, 32, torch.float16)
    with pytest.raises(ValueError, match=r"model\.overrides names hiden_size"):
        read(tmp_path, values, overrides={"hiden_size": 3})


def test_windows_follow_layer_types(tmp_path: Path) -> None:
    qwen = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 8}
    assert read(tmp_path, qwen).windows == (None,) * 4
    assert read(tmp_path, qwen | {"use_sliding_window": True, "max_window_layers": 3}).windows == (None,) * 3 + (8,)
    mistral = qwen | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    assert read(tmp_path, mistral).windows == (8,) * 4


def test_sparse_layers(tmp_path: Path) -> None:
    moe = LLAMA | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
    }
    arch = read(tmp_path, moe)
    assert arch.sparse == (False, True, False, False)
    assert (arch.num_experts, arch.experts_per_token, arch.moe_intermediate_size) == (4, 2, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "GPT2LMHeadModel.*" + ".*".join(FAMILIES)),
        ({"architectures": ["NewForCausalLM"], "model_type": "never_seen"}, "NewForCausalLM.*LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*supported"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic.*yarn"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_what_is_not_supported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, LLAMA | changes)
    assert "\n" not in str(raised.value)


def test_missing_or_broken_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        read_architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model\.path=.*: .*JSON"):
        read_architecture(str(tmp_path))
    with pytest.raises(ValueError, match="nowhere is neither a model folder nor a Hub id") as raised:
        read_architecture(str(tmp_path / "nowhere"))
    assert "\n" not in str(raised.value)


def test_topology_must_divide_the_model(tmp_path: Path) -> None:
    arch = read(tmp_path, LLAMA)
    for tp in (1, 2, 4):
        check_topology(arch, Topology(tp=tp))
    with pytest.raises(ValueError, match=r"tp=8 must divide.*heads=8.*heads=4.*size=96.*1, 2, 4 would fit"):
        check_topology(arch, Topology(tp=8))
    with pytest.raises(ValueError, match=r"pp=5 needs at least 5 layers, the model has 4"):
        check_topology(arch, Topology(pp=5))
    assert [arch.padded_vocab_size(tp) for tp in (1, 2, 4)] == [129, 130, 132]
