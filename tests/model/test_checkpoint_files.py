"""Which files, and which of their tensors, make the checkpoint: those that transformers would take."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from spmd.model.architecture import read_architecture
from spmd.model.checkpoint import as_stored, check_files, load
from spmd.model.decoder import Decoder
from spmd.parallel.tensor import TensorParallel
from tests.model.test_checkpoint import Edit, edit, loaded
from tests.support.checkpoints import write_checkpoint


def garbage(path: str, name: str) -> None:
    """Another file with the same tensors, all zero."""
    zeros = {key: torch.zeros_like(value) for key, value in load_file(Path(path) / "model.safetensors").items()}
    save_file(zeros, Path(path) / name)


OTHERS = ("model_step100.safetensors", "a.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors")


@pytest.mark.parametrize("other", OTHERS)
def test_a_whole_file_counts_alone(tmp_path: Path, other: str) -> None:
    """As in transformers, whatever else lies beside it."""
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    before = loaded(path).state_dict()
    garbage(path, other)
    torch.testing.assert_close(loaded(path).state_dict(), before, rtol=0, atol=0)
    theirs = AutoModelForCausalLM.from_pretrained(path).get_output_embeddings().weight
    torch.testing.assert_close(before["lm_head.weight.values"], theirs, rtol=0, atol=0)


def test_a_whole_file_counts_before_an_index_that_was_left(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM", seed=1, shard="100KB")
    before = loaded(write_checkpoint(tmp_path / "other", "Qwen3ForCausalLM", seed=2)).state_dict()
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    next(tmp_path.glob("model-00002*")).unlink()
    torch.testing.assert_close(loaded(path).state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_files_of_other_programs_are_passed_over(tmp_path: Path, shard: str) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM", shard=shard)
    before = loaded(path).state_dict()
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    save_file({"base_model.model.lora_A.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "._model.safetensors").write_bytes(b"of a Mac")
    torch.testing.assert_close(loaded(path).state_dict(), before, rtol=0, atol=0)
    checkpoint = check_files(read_architecture(path), path, "auto", None, [range(4)])
    assert checkpoint is not None and all(file.name.startswith("model") for file in checkpoint.files.values())


def test_without_a_whole_file_and_an_index_no_tensor_may_be_there_twice(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM", shard="100KB")
    before = loaded(path).state_dict()
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "._model-00001.safetensors").write_bytes(b"of a Mac")
    torch.testing.assert_close(loaded(path).state_dict(), before, rtol=0, atol=0)
    shard = next(file for file in sorted(tmp_path.glob("model-*")) if "model.norm.weight" in load_file(file))
    save_file({"model.norm.weight": torch.zeros(64)}, tmp_path / "zz.safetensors")
    twice = rf"{shard.name} and zz\.safetensors both hold model\.norm\.weight; move the one"
    with pytest.raises(ValueError, match=twice):
        loaded(path)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    edit(path, lambda tensors: tensors.update({"norm.weight": torch.zeros(64)}))
    with pytest.raises(
        ValueError, match=r"model\.safetensors holds twice norm\.weight \(as .*norm.weight and .*norm.wei"
    ):
        loaded(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "consolidated.safetensors",
            r"no \*\.safetensors of a whole model in .* format, only consolidated\.safetensors",
        ),
        ("adapter_model.safetensors", r"of a whole model in .* format, only adapter_model\.safetensors"),
        ("pytorch_model.bin", r"only pytorch_model\.bin: load it with transformers and save_pretrained it elsewhere"),
        ("model.Q4_K_M.gguf", r"only model\.Q4_K_M\.gguf: load it with transformers"),
    ],
)
def test_what_lies_in_the_place_of_weights_is_named(tmp_path: Path, name: str, message: str) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(ValueError, match=message + ".*load_format=dummy"):
        loaded(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "model-00002-of-"])
def test_the_pointer_that_git_lfs_leaves(tmp_path: Path, name: str) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM", shard="1GB" if name == "model.safetensors" else "100KB")
    file = next(tmp_path.glob(f"{name}*"))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 500\n")
    with pytest.raises(
        ValueError, match=f"{file} is a Git LFS pointer, not the file itself: git lfs pull in its folder"
    ):
        check_files(read_architecture(path), path, "auto", None, [range(4)])


def test_a_file_that_is_not_whole_is_told_with_its_size(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(
        ValueError, match=r"safetensors cannot be read: .*; of its 100 bytes some may lack: fetch it again$"
    ):
        loaded(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_of_numbers_that_need_scales(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM")
    name = "model.layers.1.mlp.up_proj.weight"
    edit(path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(
        ValueError, match=r"up_proj\.weight is stored as [FIU]8.*; quantized checkpoints are not supported"
    ):
        check_files(read_architecture(path), path, "auto", None, [range(4)])


def apart(tensors: dict[str, Tensor]) -> None:
    """A head of its own, which differs in its last row alone."""
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1] += 1


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def twice(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


@pytest.mark.parametrize(("change", "tied"), [(apart, False), (rename, True), (twice, True), (dict.copy, True)])
@pytest.mark.parametrize("tp", [1, 2])
def test_config_json_ties_what_the_file_holds_otherwise(tmp_path: Path, change: Edit, tied: bool, tp: int) -> None:
    """Embedding and head are those that transformers takes, on one stage and on two."""
    path = write_checkpoint(tmp_path, "Qwen2ForCausalLM", tie_word_embeddings=True)
    edit(path, change)
    theirs = AutoModelForCausalLM.from_pretrained(path)
    arch = as_stored(read_architecture(path), path, "auto", None)
    assert arch.tie_word_embeddings == tied
    check_files(arch, path, "auto", None, [range(2), range(2, 4)])
    for first, last in ((True, True), (True, False), (False, True)):
        decoder = Decoder(arch, first=first, last=last, tp=TensorParallel(0, tp))
        load(decoder, path)
        for module, weight in (
            (decoder.embed_tokens, theirs.get_input_embeddings().weight),
            (decoder.lm_head, theirs.get_output_embeddings().weight),
        ):
            if module is not None:
                torch.testing.assert_close(module.weight.values, weight[: 128 // tp].detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "lacking"), [(rename, "embed_tokens"), (lambda t: t.pop("lm_head.weight"), "lm_head")]
)
def test_one_matrix_of_two_that_config_json_does_not_tie(tmp_path: Path, change: Edit, lacking: str) -> None:
    path = write_checkpoint(tmp_path, "Qwen3ForCausalLM", tie_word_embeddings=False)
    edit(path, change)
    said = (
        rf"lacks {lacking}\.weight, .*; if one matrix is both, say so: 'model\.overrides={{tie_word_embeddings: true}}'"
    )
    with pytest.raises(ValueError, match=said):
        check_files(read_architecture(path), path, "auto", None, [range(4)])
    tied = read_architecture(path, overrides={"tie_word_embeddings": True})
    check_files(tied, path, "auto", None, [range(2), range(2, 4)])
