"""How many places another model family touches: 1 new entry, in `spmd.model.architecture.FAMILIES`.

The family is made up: Qwen3's mathematics under another name, whose flags are written down here. What its configuration
looks like transformers knows, as it does of any family on the Hub, so that is told to transformers alone.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen3Config

from spmd.model.architecture import FAMILIES, Family, read_architecture
from tests.model.test_decoder import Pipeline, in_all_ways, reference
from tests.support.checkpoints import write_checkpoint


class ToyConfig(Qwen3Config):  # type: ignore[misc]  # transformers is not read for types
    model_type = "toy"


def renamed(folder: Path) -> str:
    """A checkpoint of the new family."""
    path = write_checkpoint(folder, "Qwen3ForCausalLM")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["ToyForCausalLM"], "model_type": "toy"}))
    return path


def test_a_family_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(write_checkpoint(tmp_path / "known", "Qwen3ForCausalLM"))
    path = renamed(tmp_path / "new")
    with pytest.raises(ValueError, match="architecture ToyForCausalLM is not supported"):
        read_architecture(path)
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    monkeypatch.setitem(FAMILIES, "ToyForCausalLM", Family(qk_norm=True))
    in_all_ways(Pipeline(path), expected)


def test_a_flag_of_it_is_a_value_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its flag the same checkpoint holds tensors that the family doesn't have."""
    AutoConfig.register("toy", ToyConfig, exist_ok=True)
    monkeypatch.setitem(FAMILIES, "ToyForCausalLM", Family())
    path = renamed(tmp_path)
    assert read_architecture(path).dtype == torch.float32
    with pytest.raises(ValueError, match=r"holds .*self_attn\.k_norm\.weight.*, which ToyForCausalLM"):
        Pipeline(path)
