"""How many places another model family touches: 1 new entry, in `spmd.model.architecture.FAMILIES`, and 1 new file if
it has an attention or MLP of its own.

One family is made up: Qwen3's mathematics under another name, whose flags are written down here. What its configuration
looks like transformers knows, as it does of any family on the Hub, so that is told to transformers alone. The other is
Arcee, whose MLP has one linear up and squares what is positive; the class here stands for the new file.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen3Config

from spmd.model.architecture import FAMILIES, Architecture, Family, read_architecture
from spmd.model.backend import Backend
from spmd.model.cost import layer_params
from spmd.model.decoder import Decoder
from spmd.model.layers import ColumnLinear, RowLinear
from spmd.parallel.experts import ExpertParallel
from spmd.parallel.tensor import TensorParallel
from tests.model.test_decoder import Pipeline, in_all_ways, reference
from tests.support.checkpoints import write_checkpoint


class ToyConfig(Qwen3Config):  # type: ignore[misc]  # transformers is not read for types
    model_type = "toy"


class SquaredMLP(nn.Module):
    """down(relu(up(x)) ** 2)."""

    def __init__(self, arch: Architecture, tp: TensorParallel, ep: ExpertParallel) -> None:
        super().__init__()
        hidden, inner, bias = arch.hidden_size, arch.intermediate_size, arch.mlp_bias
        self.up = ColumnLinear(arch, hidden, {"up_proj": inner}, bias, tp)
        self.down_proj = RowLinear(arch, inner, hidden, bias, tp)

    def forward(self, x: Tensor, backend: Backend, shared_rows: int | None = None) -> Tensor:
        added: Tensor = self.down_proj(self.up(x, backend).relu().square(), backend)
        return added


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


def test_an_mlp_of_its_own_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path, "ArceeForCausalLM", mlp_bias=True)
    arcee = Family(attention_bias=True, mlp=f"{__name__}:SquaredMLP", activations=("relu2",))
    monkeypatch.setitem(FAMILIES, "ArceeForCausalLM", arcee)
    in_all_ways(Pipeline(path, cuts=(2,)), reference(path))
    arch = read_architecture(path)
    layer = Decoder(arch, device="meta").layers["0"]
    assert layer_params(arch, 0) == sum(parameter.numel() for parameter in layer.parameters())
