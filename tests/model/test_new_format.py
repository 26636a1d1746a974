"""What another format of weights takes: 1 new class. Here 8-bit numbers in blocks, each block with a scale."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spmd.model.architecture import Architecture, read_architecture
from spmd.model.checkpoint import load
from spmd.model.cost import layer_bytes, layer_params
from spmd.model.decoder import Decoder
from spmd.model.linear import Matrix, Stored, Weight, WeightFormat
from spmd.parallel.tensor import TensorParallel
from tests.model.test_decoder import Pipeline, in_all_ways, reference
from tests.support.checkpoints import write_checkpoint

BLOCK = 16


class Blocks(WeightFormat):
    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        super().__init__(dtype, *shape)
        *stack, out, size = shape
        self.values = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(*stack, out // BLOCK, size // BLOCK), requires_grad=False)

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        product = F.linear(x, widened(self.values, self.scales), bias)
        return product if out is None else out.copy_(product)

    def __getitem__(self, index: int, /) -> Weight:
        return Matrix(widened(self.values[index], self.scales[index]))

    def stored(self) -> Iterator[Stored]:
        yield Stored("weight", self.values)
        yield Stored("weight_scale_inv", self.scales, BLOCK)


def widened(values: Tensor, scales: Tensor) -> Tensor:
    return values * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def narrowed(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = weight.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / 127
    values = (blocks / scales[:, None, :, None]).round().to(torch.int8)
    return values.flatten(2).flatten(0, 1), scales


def checkpoints(folder: Path, family: str) -> tuple[str, str]:
    """One in blocks, and one with the same weights as float32."""
    path, wide = (write_checkpoint(folder / name, family) for name in ("blocks", "wide"))
    tensors = load_file(f"{path}/model.safetensors")
    dense = dict(tensors)
    for name in [name for name in tensors if ".self_attn." in name or ".mlp." in name]:
        if name.endswith("proj.weight"):
            tensors[name], scales = narrowed(tensors[name])
            tensors[f"{name}_scale_inv"], dense[name] = scales, widened(tensors[name], scales)
    save_file(tensors, f"{path}/model.safetensors")
    save_file(dense, f"{wide}/model.safetensors", metadata={"format": "pt"})
    return path, wide


def in_blocks(path: str, dtype: str = "auto") -> Architecture:
    return replace(read_architecture(path, dtype), weight_format=Blocks)


@pytest.mark.parametrize("family", ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_format_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Layers, loader, memory and costs take it as it is."""
    path, wide = checkpoints(tmp_path, family)
    monkeypatch.setattr("tests.model.test_decoder.read_architecture", in_blocks)
    in_all_ways(Pipeline(path, cuts=(2,)), reference(wide))
    arch = in_blocks(path)
    for layer, module in enumerate(Decoder(arch, device="meta").layers.values()):
        assert layer_bytes(arch, layer) == sum(p.nbytes for p in module.parameters())
        assert layer_bytes(arch, layer) < 1.2 * layer_params(arch, layer)


def test_ranks_hold_their_share_of_all_its_tensors(tmp_path: Path) -> None:
    path, _ = checkpoints(tmp_path, "Qwen3ForCausalLM")
    whole, *parts = [Decoder(in_blocks(path), tp=tp) for tp in (None, TensorParallel(0, 2), TensorParallel(1, 2))]
    for decoder in (whole, *parts):
        load(decoder, path)
    down, *shares = [decoder.get_submodule("layers.1.mlp.down_proj").weight for decoder in (whole, *parts)]
    for name in ("values", "scales"):
        assert torch.equal(torch.cat([getattr(share, name) for share in shares], dim=1), getattr(down, name))
