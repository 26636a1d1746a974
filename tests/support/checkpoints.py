"""Writes small random float32 checkpoints of every family, with transformers, to compare with transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from spmd.model import architecture

FAMILIES = tuple(architecture.FAMILIES)

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    # Nothing ends a sequence but its length.
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

# Values of rope_parameters.
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn_with_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "beta_fast": 16.0,
        "truncate": False,
    },
}

OF_FAMILY: dict[str, dict[str, Any]] = {
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def write_checkpoint(folder: Path | str, family: str, seed: int = 0, shard: str = "1GB", **overrides: Any) -> str:
    """Write a checkpoint of `family` into `folder` and return its path.

    Args:
        shard: size of one safetensors file; "100KB" makes several.
        overrides: keys of config.json, in place of the small defaults.
    """
    values = SHAPE | OF_FAMILY.get(family, {}) | overrides
    if family == "Qwen2ForCausalLM":
        del values["head_dim"]
    config = getattr(transformers, family.replace("ForCausalLM", "Config"))(**values)
    model = getattr(transformers, family)(config)
    _randomize(model, seed)
    model.save_pretrained(folder, max_shard_size=shard)
    return str(folder)


@torch.no_grad()
def _randomize(model: nn.Module, seed: int) -> None:
    """Values large enough that every tensor shows in the logits, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * drawn if "norm" in name else 0.15 * drawn)
