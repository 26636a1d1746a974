"""What makes a checkpoint another one, and what doesn't."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmd.journal.fingerprint import SAMPLE_BYTES, fingerprint
from tests.support.checkpoints import write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a tokenizer, and a file that has nothing to do with answers."""
    folder = tmp_path / "model"
    write_checkpoint(folder, "Qwen3ForCausalLM", vocab_size=269)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("what it is good for")
    return folder


def changed(model: Path, before: dict[str, str]) -> set[str]:
    after = fingerprint(str(model))
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_a_copy_elsewhere_is_the_same(model: Path, tmp_path: Path) -> None:
    before = fingerprint(str(model))
    assert {"config.json", "tokenizer.json", "weights"} <= set(before)
    assert before["weights"].endswith(f" of 1 files, {(model / 'model.safetensors').stat().st_size:,} bytes")
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another text")
    assert fingerprint(str(tmp_path / "copy")) == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_each_file_that_shapes_answers_counts(model: Path, name: str) -> None:
    before = fingerprint(str(model))
    with open(model / name, "a") as file:
        file.write(" ")
    assert changed(model, before) == {name}


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj", "layers.3.self_attn.q_proj", "embed_tokens", "norm"])
def test_weights_of_every_kind_count(model: Path, name: str) -> None:
    before = fingerprint(str(model))
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.{name}.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    assert changed(model, before) == {"weights"}


def test_large_weights_are_sampled(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = [f"model.layers.{layer}.mlp.weight" for layer in range(5)]
    tensors = {name: torch.zeros(SAMPLE_BYTES, dtype=torch.float32) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint(str(tmp_path))
    for name, place, seen in (
        *((names[0], SAMPLE_BYTES // 2, True), (names[4], SAMPLE_BYTES // 2, True)),
        *((names[2], SAMPLE_BYTES // 2, False), (names[0], 0, False)),
    ):
        tensors[name][place] = 1
        save_file(tensors, tmp_path / "model.safetensors")
        assert bool(changed(tmp_path, before)) == seen
        tensors[name][place] = 0


def test_random_weights_are_not_looked_at_and_a_tokenizer_may_lie_elsewhere(model: Path, tmp_path: Path) -> None:
    before = fingerprint(str(model), "dummy", tokenizer=str(tmp_path / "model"))
    assert "weights" not in before
    (model / "model.safetensors").unlink()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.json").write_text("[]")
    after = fingerprint(str(model), "dummy", tokenizer=str(tmp_path / "text"))
    assert {name for name in before if before[name] != after[name]} == {"tokenizer.json"}
    with pytest.raises(ValueError, match=r"nowhere is neither a folder nor a Hub id within reach"):
        fingerprint(str(model), tokenizer=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]", b"\0" * 8])
def test_broken_weights_are_left_to_those_who_load_them(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert fingerprint(str(model))["weights"].endswith(f" of 1 files, {len(content)} bytes")


def test_a_header_of_another_form_is_passed_over(model: Path) -> None:
    header = json.dumps({"a": {"data_offsets": [0]}, "b": 5}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert fingerprint(str(model))["weights"]
