"""What makes a checkpoint another one, and what doesn't."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmd.journal import fingerprint as room
from spmd.journal.fingerprint import PIECES, SAMPLE_BYTES, fingerprint, first_form
from spmd.model.checkpoint import weight_files
from tests.support.checkpoints import write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a tokenizer, and a file that has nothing to do with answers."""
    folder = tmp_path / "model"
    write_checkpoint(folder, "Qwen3ForCausalLM", vocab_size=269)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("what it is good for")
    return folder


def told(model: Path) -> dict[str, str]:
    return fingerprint(str(model), weight_files(model))


def changed(model: Path, before: dict[str, str]) -> set[str]:
    after = told(model)
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_a_copy_elsewhere_is_the_same(model: Path, tmp_path: Path) -> None:
    before = told(model)
    assert {"config.json", "tokenizer.json", "weights"} <= set(before)
    size, count = (model / "model.safetensors").stat().st_size, len(load_file(model / "model.safetensors"))
    assert before["weights"].endswith(f" of 1 files, {size:,} bytes, {count} tensors")
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("another text")
    assert told(tmp_path / "copy") == before


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"])
def test_each_file_that_shapes_answers_counts(model: Path, name: str) -> None:
    before = told(model)
    with open(model / name, "a") as file:
        file.write(" ")
    assert changed(model, before) == {name}


def test_every_tensor_counts(model: Path) -> None:
    """Those of layers in the middle too, which an earlier version passed over."""
    before, file = told(model), model / "model.safetensors"
    tensors = load_file(file)
    assert len(tensors) > 40
    for name in tensors:
        save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
        assert changed(model, before) == {"weights"}, name
    save_file(tensors, file, {"format": "pt"})
    assert not changed(model, before)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
def test_files_that_do_not_count_make_no_difference(tmp_path: Path, shard: str) -> None:
    write_checkpoint(tmp_path, "Qwen3ForCausalLM", shard=shard)
    before = told(tmp_path)
    for name in ("consolidated", "adapter_model"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    assert told(tmp_path) == before


def test_large_tensors_are_read_in_pieces_from_their_beginning_to_their_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = [f"model.layers.{layer}.mlp.weight" for layer in range(5)]
    tensors = {name: torch.zeros(SAMPLE_BYTES, dtype=torch.float32) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    before = told(tmp_path)
    piece, last = SAMPLE_BYTES // PIECES // 4, SAMPLE_BYTES - 1  # in numbers of 4 bytes
    for name in names:
        for place, seen in ((0, True), (piece - 1, True), (piece, False), (last, True), (last - piece, False)):
            tensors[name][place] = 1
            save_file(tensors, tmp_path / "model.safetensors")
            assert bool(changed(tmp_path, before)) == seen
            tensors[name][place] = 0


def test_what_is_read_of_all_tensors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{number}": torch.full((500,), float(number)) for number in range(100)}
    for part in range(4):
        share = {name: tensor for name, tensor in tensors.items() if int(name) % 4 == part}
        save_file(share, tmp_path / f"model-{part}.safetensors")
    sizes: list[int] = []
    pread = os.pread

    def counted(file: int, size: int, at: int) -> bytes:
        sizes.append(size)
        return pread(file, size, at)

    monkeypatch.setattr(os, "pread", counted)
    monkeypatch.setattr(room, "ALL_BYTES", 10_000)
    before = told(tmp_path)
    assert sum(sizes) == 10_000 and min(sizes) == 100 // PIECES
    for name in ("1", "50"):  # of the second and the third file
        file = tmp_path / f"model-{int(name) % 4}.safetensors"
        save_file(load_file(file) | {name: tensors[name] + 1}, file)
        assert changed(tmp_path, before) == {"weights"}
        save_file(load_file(file) | {name: tensors[name]}, file)


def test_what_an_earlier_version_said_of_the_same_files_is_said_again(tmp_path: Path) -> None:
    """The values are those of that version."""
    tensors = {f"layers.{layer}.weight": torch.arange(40000.0) + layer for layer in range(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    theirs = "1e9a7663bb9b369b of 1 files, 800,416 bytes"
    ours = told(tmp_path)["weights"]
    assert first_form(theirs, weight_files(tmp_path)) == theirs
    assert first_form(ours, weight_files(tmp_path)) is None
    assert first_form(str(None), weight_files(tmp_path)) is None
    save_file(tensors | {"layers.4.weight": torch.zeros(40000)}, tmp_path / "model.safetensors")
    another = first_form(theirs, weight_files(tmp_path))
    assert another is not None and another != theirs
    save_file(tensors, tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model_step100.safetensors")  # that version answered with this one
    assert first_form(theirs, weight_files(tmp_path)) is None


def test_random_weights_are_not_looked_at_and_a_tokenizer_may_lie_elsewhere(model: Path, tmp_path: Path) -> None:
    before = fingerprint(str(model), tokenizer=str(tmp_path / "model"))
    assert "weights" not in before
    (model / "model.safetensors").unlink()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.json").write_text("[]")
    after = fingerprint(str(model), tokenizer=str(tmp_path / "text"))
    assert {name for name in before if before[name] != after[name]} == {"tokenizer.json"}
    with pytest.raises(ValueError, match=r"nowhere is neither a folder nor a Hub id within reach"):
        fingerprint(str(model), tokenizer=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]", b"\0" * 8])
def test_broken_weights_are_left_to_those_who_load_them(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert told(model)["weights"].endswith(f" of 1 files, {len(content)} bytes, 0 tensors")


def test_a_header_of_another_form_is_passed_over(model: Path) -> None:
    header = json.dumps({"a": {"data_offsets": [0]}, "b": 5}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert told(model)["weights"]
