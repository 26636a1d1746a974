"""Loading: which files and tensors are read, what is refused, and the random weights of `dummy`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spmd.model.architecture import read_architecture
from spmd.model.checkpoint import check_files, load, resolve
from spmd.model.decoder import Decoder
from spmd.parallel.tensor import TensorParallel
from tests.support.checkpoints import FAMILIES, write_checkpoint

Edit = Callable[[dict[str, Tensor]], object]


def edit(path: str, change: Edit) -> None:
    file = Path(path) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def loaded(path: str, load_format: str = "auto", tp: TensorParallel | None = None, **place: object) -> Decoder:
    decoder = Decoder(read_architecture(path), tp=tp, **place)  # type: ignore[arg-type]
    load(decoder, path, load_format)
    return decoder


def test_sharded_files_hold_the_same_model(tmp_path: Path) -> None:
    one = loaded(write_checkpoint(tmp_path / "one", "Qwen3ForCausalLM"))
    path = write_checkpoint(tmp_path / "many", "Qwen3ForCausalLM", shard="100KB")
    assert len(list(Path(path).glob("*.safetensors"))) > 2
    torch.testing.assert_close(loaded(path).state_dict(), one.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_stacked_experts_hold_the_same_model(tmp_path: Path, family: str) -> None:
    """transformers 5 writes one tensor an expert, or with save_original_format=False its own stacked ones."""
    path = write_checkpoint(tmp_path, family)
    tp = TensorParallel(1, 2)
    separate = loaded(path, tp=tp).state_dict()
    first, second, down = ("w1", "w3", "w2") if family.startswith("Mixtral") else ("gate_proj", "up_proj", "down_proj")

    def stack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if f".experts.0.{first}." in name]:
            prefix = name.partition(".experts.")[0]

            def take(part: str, prefix: str = prefix) -> Tensor:
                return torch.stack([tensors.pop(f"{prefix}.experts.{e}.{part}.weight") for e in range(4)])

            tensors[f"{prefix}.experts.gate_up_proj"] = torch.cat((take(first), take(second)), dim=1)
            tensors[f"{prefix}.experts.down_proj"] = take(down)

    edit(path, stack)
    torch.testing.assert_close(loaded(path, tp=tp).state_dict(), separate, rtol=0, atol=0)


def test_tied_head_is_the_embedding_on_either_stage(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "Qwen2ForCausalLM", tie_word_embeddings=True)
    whole = loaded(path)
    assert whole.embed_tokens is not None and whole.lm_head is not None
    assert whole.lm_head.weight is whole.embed_tokens.weight
    edit(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(128, 64)}))  # redundant, not read
    last = loaded(path, layers=range(3, 4), first=False)
    assert last.lm_head is not None
    torch.testing.assert_close(last.lm_head.weight.values, whole.embed_tokens.weight.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), r"lacks lm_head\.weight"),
        (lambda tensors: tensors.pop("model.layers.2.self_attn.k_proj.weight"), r"lacks layers\.2\.self_attn\.k_proj"),
        (
            lambda tensors: tensors.update({"model.extra": torch.zeros(1)}),
            r"holds model\.extra, which .* \(in model\.safetensors\)$",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}),
            r"norm\.weight has shape \(65,\).*\(64,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: Edit, message: str) -> None:
    path = write_checkpoint(tmp_path, "LlamaForCausalLM")
    edit(path, change)
    with pytest.raises(ValueError, match=message) as raised:
        loaded(path)
    assert "\n" not in str(raised.value)


def test_inverse_frequencies_in_old_files_are_ignored(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "LlamaForCausalLM")
    edit(path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert loaded(path).norm is not None


def test_stage_reads_no_file_but_its_own(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "LlamaForCausalLM", shard="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first = {file for name, file in index.items() if ".layers.0." in name}
    for file in set(index.values()) - first:
        (tmp_path / file).write_bytes(b"broken")
    loaded(path, layers=range(1), first=False, last=False)
    with pytest.raises(ValueError, match="cannot be read"):
        loaded(path)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "sharded", "LlamaForCausalLM", shard="100KB")
    next(Path(path).glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lacks model-0000.*safetensors, which model\.safetensors\.index\.json names"):
        loaded(path)
    path = write_checkpoint(tmp_path / "single", "LlamaForCausalLM")
    file = Path(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        loaded(path)
    file.unlink()
    with pytest.raises(ValueError, match="load_format=dummy"):
        loaded(path)


def test_dummy_weights_do_not_depend_on_the_topology(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "Qwen3MoeForCausalLM", vocab_size=129, mlp_only_layers=[1])
    whole = loaded(path, "dummy")
    assert whole.embed_tokens is not None and 0.015 < whole.embed_tokens.weight.values.std() < 0.025
    torch.testing.assert_close(loaded(path, "dummy").state_dict(), whole.state_dict(), rtol=0, atol=0)
    every = whole.pieces()
    for rank in range(2):
        share = loaded(path, "dummy", TensorParallel(rank, 2), layers=range(1, 4), first=False)
        for name, pieces in share.pieces().items():
            torch.testing.assert_close(pieces[0].target, every[name][0].target[pieces[0].index], rtol=0, atol=0)


def test_resolve(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="nowhere/at/all is neither a folder nor a Hub id"):
        resolve("nowhere/at/all")


@pytest.mark.parametrize("family", FAMILIES)
def test_headers_tell_what_the_stages_lack(tmp_path: Path, family: str) -> None:
    """Of all stages at once, and with several it is said which needs it."""
    path = write_checkpoint(tmp_path, family)
    arch, two = read_architecture(path), [range(3), range(3, 4)]
    checkpoint = check_files(arch, path, "auto", None, two)
    assert checkpoint is not None and {file.name for file in checkpoint.files.values()} == {"model.safetensors"}
    edit(path, lambda tensors: (tensors.pop("model.layers.3.input_layernorm.weight"), tensors.pop("lm_head.weight")))
    lacking = r"lacks layers\.3\.input_layernorm\.weight, lm_head\.weight, which " + family + " needs"
    with pytest.raises(ValueError, match=lacking + r" on stage 1 \(layers 3-3\)$"):
        check_files(arch, path, "auto", None, two)
    with pytest.raises(ValueError, match=lacking + "$"):
        check_files(arch, path, "auto", None, [range(4)])
    assert check_files(arch, path, "dummy", None, two) is None


def test_headers_tell_of_tied_embeddings_and_of_shapes(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "Qwen2ForCausalLM", tie_word_embeddings=True)
    arch, two = read_architecture(path), [range(2), range(2, 4)]
    check_files(arch, path, "auto", None, two)
    edit(path, lambda tensors: tensors.update({"model.layers.3.self_attn.q_proj.bias": torch.zeros(65)}))
    with pytest.raises(ValueError, match=r"layers\.3\.self_attn\.q_proj\.bias has shape \(65,\), .* implies \(64,\)"):
        check_files(arch, path, "auto", None, two)
    edit(path, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"lacks embed_tokens\.weight, which Qwen2ForCausalLM needs on stage 0"):
        check_files(arch, path, "auto", None, two)


def test_an_index_that_is_broken(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "LlamaForCausalLM", shard="100KB")
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{", "[]", "{}"):
        index.write_text(content)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json cannot be read: "):
            loaded(path)
