"""An output and the checkpoint that began it, which versions before told from others in another way."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spmd import run_files
from spmd.journal.fingerprint import fingerprint, first_form
from spmd.journal.identity import told_earlier
from spmd.journal.paths import Paths
from tests.support.checkpoints import write_checkpoint
from tests.support.jobs import run_here, write_rows

FILES = ("input=in.jsonl", "output=out.jsonl", "run_dir=run", "progress=false", "model.path=model", "device=cpu")
ROWS = [{"prompt": [5, 6 + row], "max_tokens": 3, "custom_id": f"{row}"} for row in range(4)]
Said = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a model and the first two rows; the folder that runs are in."""
    write_checkpoint(tmp_path / "model", "Qwen3ForCausalLM")
    write_rows(tmp_path / "in.jsonl", ROWS[:2])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(name: str) -> None:
    """One number more in one tensor."""
    tensors = load_file("model/model.safetensors")
    tensors[name].view(-1)[0] += 1
    save_file(tensors, "model/model.safetensors", {"format": "pt"})


def by_the_version_before(
    path: str, weights: Sequence[Path], revision: str | None, tokenizer: str | None
) -> dict[str, str]:
    theirs = first_form("0" * 16 + " of 1 files, 1 bytes", weights)
    assert theirs
    return fingerprint(path, weights, revision, tokenizer) | {"weights": theirs}


def told() -> str:
    return str(told_earlier(Paths.of("out.jsonl"), "weights"))


def begin_by_the_version_before(monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as older:
        older.setattr(run_files, "fingerprint", by_the_version_before)
        assert run_here(*FILES) == 0
    assert "tensors" not in told()
    return told()


def test_an_output_that_the_version_before_began_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    theirs = begin_by_the_version_before(monkeypatch)
    write_rows(folder / "in.jsonl", ROWS)
    assert run_here(*FILES) == 0
    assert "resumed: 2 more rows were done by earlier runs" in capsys.readouterr().out
    assert told() == theirs
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["0", "1", "2", "3"]
    assert run_here(*FILES) == 0
    assert "nothing to do: all 4 rows were done by earlier runs" in capsys.readouterr().out


def test_and_not_with_another_checkpoint_and_anew_by_the_new_form(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    theirs = begin_by_the_version_before(monkeypatch)
    edit("model.layers.0.mlp.up_proj.weight")
    assert run_here(*FILES) == 2
    assert f'other settings: weights was "{theirs}", is "' in capsys.readouterr().err
    assert run_here(*FILES, "resume=fresh") == 0
    assert told().endswith(" tensors")


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj", "layers.2.input_layernorm", "layers.1.self_attn.q_proj"])
def test_a_checkpoint_edited_in_the_middle_does_not_go_on(folder: Path, capsys: Said, name: str) -> None:
    assert run_here(*FILES) == 0
    edit(f"model.{name}.weight")
    write_rows(folder / "in.jsonl", ROWS)
    assert run_here(*FILES) == 2
    assert 'other settings: weights was "' in capsys.readouterr().err


def test_files_that_do_not_count_are_no_reason_to_stop(folder: Path, capsys: Said) -> None:
    assert run_here(*FILES) == 0
    save_file(load_file("model/model.safetensors"), "model/model_step100.safetensors")
    write_rows(folder / "in.jsonl", ROWS)
    assert run_here(*FILES) == 0
    assert "resumed: 2 more rows" in capsys.readouterr().out
