"""What config.json may say: values whose meaning is plain, both generations of keys, what is refused in one line."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from spmd.config import Config, ModelConfig
from spmd.model.architecture import Architecture, read_architecture
from spmd.model.rope import attention_scale, inverse_frequencies
from spmd.settings import read_model

OLD: dict[str, Any] = {  # as transformers 4 wrote it
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 129,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "rope_theta": 1e6,
}
WITHOUT = {key: value for key, value in OLD.items() if key not in ("torch_dtype", "rope_theta")}
NEW = WITHOUT | {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
MOE = OLD | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts_per_tok": 2}


def read(folder: Path, values: Any, overrides: dict[str, Any] | None = None, dtype: str = "auto") -> Architecture:
    (folder / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return read_architecture(str(folder), dtype, overrides=deepcopy(overrides))


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", torch.float32),  # as if it weren't named
        ("bf16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("BFloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        ("half", torch.float16),
        ("fp32", torch.float32),
    ],
)
def test_names_of_a_dtype_that_are_plain(tmp_path: Path, key: str, name: str, dtype: torch.dtype) -> None:
    assert read(tmp_path, WITHOUT | {key: name}).dtype == dtype


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float64", "int8", "", 5, {"": "bfloat16"}, ["bfloat16"]])
def test_a_dtype_that_no_weight_here_can_have(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ValueError, match=r"is not one of float32, bfloat16, float16: model\.dtype=bfloat16 names"):
        read(tmp_path, OLD | {"torch_dtype": name})
    assert read(tmp_path, OLD | {"torch_dtype": name}, dtype="float16").dtype == torch.float16


@pytest.mark.parametrize("values", [OLD, NEW], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize(
    ("overrides", "rope"),
    [
        ({"rope_scaling": YARN}, YARN),
        ({"rope_parameters": YARN}, YARN),
        ({"rope_scaling": {"type": "linear", "factor": "2.0"}}, LINEAR),
        ({"rope_scaling": YARN | {"factor": "4", "original_max_position_embeddings": "256"}}, YARN),
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({"rope_theta": "5e5", "rope_scaling": LINEAR}, LINEAR | {"rope_theta": 5e5}),
        ({"rope_parameters": LINEAR | {"rope_theta": 2e4}}, LINEAR | {"rope_theta": 2e4}),
        ({"rope_scaling": None}, {"rope_type": "default"}),
    ],
)
def test_overrides_of_either_generation_replace_what_they_name(
    tmp_path: Path, values: dict[str, Any], overrides: dict[str, Any], rope: dict[str, Any]
) -> None:
    """And no more: rope_theta stays. The frequencies are transformers' with these parameters."""
    arch = read(tmp_path, values, overrides)
    config = AutoConfig.for_model(**WITHOUT | {"rope_parameters": {"rope_theta": 1e6} | rope})
    theirs = Qwen3RotaryEmbedding(config)
    torch.testing.assert_close(inverse_frequencies(arch.rope, 16), theirs.inv_freq, rtol=0, atol=0)
    assert attention_scale(arch.rope) == theirs.attention_scaling


def test_a_factor_in_quotes_is_a_number(tmp_path: Path) -> None:
    assert read(tmp_path, OLD | {"rope_scaling": LINEAR | {"factor": "2.0"}}) == read(
        tmp_path, OLD | {"rope_scaling": LINEAR}
    )


def test_overrides_replace_a_scaling_of_the_other_generation(tmp_path: Path) -> None:
    assert read(tmp_path, OLD | {"rope_scaling": LINEAR}, {"rope_parameters": YARN}).rope.rope_type == "yarn"
    assert read(tmp_path, OLD | {"rope_scaling": LINEAR}, {"rope_parameters": None}).rope.rope_type == "default"
    new = NEW | {"rope_parameters": LINEAR | {"rope_theta": 1e6}}
    assert read(tmp_path, new, {"rope_scaling": None}).rope.rope_type == "default"
    assert read(tmp_path, NEW, {"torch_dtype": "float16"}).dtype == torch.float16
    assert read(tmp_path, MOE | {"num_local_experts": 8}, {"num_experts": 4}).num_experts == 4
    assert read(tmp_path, MOE | {"num_experts": 8}, {"num_local_experts": 4}).num_experts == 4


def test_a_scaling_of_the_old_key_in_a_config_of_the_new_one(tmp_path: Path) -> None:
    """As Qwen's cards say, put into what transformers 5 has saved: rope_theta stays."""
    rope = read(tmp_path, NEW | {"rope_scaling": {"type": "yarn", "factor": 4.0}}).rope
    assert (rope.rope_type, rope.rope_theta, rope.original_max_position_embeddings) == ("yarn", 1e6, 512)
    assert read(tmp_path, NEW | {"rope_scaling": None}).rope.rope_theta == 1e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}}, "chunk_size - local_size tokens"),
        ({"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 with rope_type linear"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": "0.5"}}, "partial_rotary_factor=0.5 with rope_type yarn"),
        ({"rope_scaling": YARN | {"attn_factor": 2}}, "attn_factor=2 of rope_type yarn is not supported"),
        ({"rope_scaling": {"factor": 4.0}}, "rope factor 4.0 has no rope_type"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "one mapping of rope parameters, for all layers",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' must be one mapping"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type linear lacks factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"rope_scaling": LINEAR | {"factor": "two"}}, "factor='two' must be a number above 0"),
        ({"rope_scaling": LINEAR | {"factor": True}}, "factor=true must be a number above 0"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "embeddings=0 must be a number above 0"),
        ({"rope_scaling": YARN | {"truncate": "false"}}, "truncate='false' must be true or false"),
        ({"rope_theta": 0}, "rope_theta=0 must be a number above 1"),
        ({"per_layer_config": {"1": {"intermediate_size": 32}}}, "per_layer_config=.* is not supported"),
        ({"is_causal": False}, "is_causal=false is not supported"),
        ({"logit_scale": 0.5}, "logit_scale=0.5 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types has chunked_attention"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window=0 must be a whole"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=8"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be a whole number, at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number, at least 1"),
        ({"model_type": None}, "model_type=null is not that of architecture Qwen3ForCausalLM"),
        ({"id2label": 5}, "config.json: "),
    ],
)
def test_what_changes_the_computation_is_done_or_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, OLD | changes)
    assert str(raised.value).startswith(f"model.path={tmp_path}: config.json") and "\n" not in str(raised.value)


def test_what_changes_nothing_is_taken(tmp_path: Path) -> None:
    plain = read(tmp_path, OLD)
    neutral = {"dual_chunk_attention_config": None, "is_causal": True, "logit_scale": 1.0, "partial_rotary_factor": 1.0}
    nothing: dict[str, Any] = {
        "quantization_config": {},
        "final_logit_softcapping": None,
        "rope_scaling": None,
        "pretraining_tp": 1,
    }
    assert read(tmp_path, OLD | neutral | nothing) == plain
    assert read(tmp_path, OLD | {"architectures": "Qwen3ForCausalLM"}) == plain
    chunked = OLD | {"dual_chunk_attention_config": {"chunk_size": 64, "local_size": 8}}
    assert read(tmp_path, chunked, {"dual_chunk_attention_config": None}) == plain


@pytest.mark.parametrize("content", ["[]", "5", "null", '"x"'])
def test_a_file_that_holds_something_else(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
        read(tmp_path, content)


def test_the_pointer_that_git_lfs_leaves(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is a Git LFS pointer, not the file itself: git lfs pull"):
        read(tmp_path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def test_an_override_that_is_no_key_but_a_method(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.overrides names to_dict, which no qwen3 config has"):
        read(tmp_path, OLD, {"to_dict": 1})
    with pytest.raises(ValueError, match="architecture GPT2LMHeadModel is not supported"):
        read(tmp_path, OLD, {"architectures": ["GPT2LMHeadModel"]})


@pytest.mark.parametrize(
    ("changes", "positions", "reach"),
    [
        (
            {"max_position_embeddings": 32768, "rope_scaling": YARN | {"original_max_position_embeddings": 32768}},
            131072,
            131072,
        ),
        (
            {"max_position_embeddings": 40960, "rope_scaling": YARN | {"original_max_position_embeddings": 32768}},
            131072,
            131072,
        ),
        (
            {"max_position_embeddings": 131072, "rope_scaling": YARN | {"original_max_position_embeddings": 32768}},
            131072,
            131072,
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.5}}, 1280, 1280),
        ({"rope_scaling": LINEAR}, 512, 1024),
        ({}, 512, 512),
    ],
)
def test_positions_with_a_scaling(tmp_path: Path, changes: dict[str, Any], positions: int, reach: int) -> None:
    """YaRN: factor x original, as vLLM. With linear scaling so many may be asked for, but it isn't the default."""
    arch = read(tmp_path, OLD | changes)
    assert (arch.max_position_embeddings, arch.rope.reach(arch.max_position_embeddings)) == (positions, reach)


def test_as_many_positions_as_yarn_reaches_may_be_asked_for(tmp_path: Path) -> None:
    """Qwen's cards: 32,768 x 4."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(OLD | {"max_position_embeddings": 40960, "rope_scaling": yarn}))

    def config(longest: int) -> Config:
        return Config(model=ModelConfig(path=str(tmp_path), max_model_len=longest))

    assert read_model(config(131072)).max_position_embeddings == 131072
    with pytest.raises(ValueError, match=r"max_model_len=131073 is more than the 131072 positions .* yarn factor 4 in"):
        read_model(config(131073))
