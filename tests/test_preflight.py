"""The check before a run: what it prints where all is well, and the one line for what would end the run."""

import gzip
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spmd.api.prompts import BEGUN_TWICE
from spmd.preflight import main
from tests.support.checkpoints import write_checkpoint
from tests.support.jobs import ROOT, run_here, write_rows
from tests.support.tiny_tokenizer import make_tokenizer

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs it in an empty folder; exit status and what was printed."""
    monkeypatch.chdir(tmp_path)

    def preflight(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["preflight.py", *overrides])
        status, _ = 0, capfd.readouterr()
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capfd.readouterr()

    return preflight


def refused(run: Run, *overrides: str) -> str:
    """The one line of an error."""
    status, _, err = run(*overrides)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").rstrip()


def test_all_is_well(run: Run, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "in.jsonl", [{"prompt": "1+2="}, {"prompt": "1+2=", "temprature": 0}, {"custom_id": "c"}] * 900
    )
    model = ("model=demo", "model.dtype=bfloat16")
    status, out, err = run("topology=pp2dp2", *model, "device=cpu", "input=in.jsonl", "output=new/out.jsonl")
    assert status == 0 and err == ""
    told = re.sub(r"[\d.]+ GiB", "_ GiB", out.replace(str(ROOT), ""))
    for line in (
        "ok  config      processes: 4 (dp 2 x pp 2 x tp 1), device: cpu",
        "                64 decode rows a micro-batch, padded to 64; 2,048 tokens a plan",
        "ok  model       Qwen3ForCausalLM, 4 layers, bfloat16, requests of up to 64 tokens",
        "ok  checkpoint  /spmd/demo/model: tensors: 46, files: 1",
        "ok  memory      _ GiB for each rank (if all ranks run on this machine), of which the KV cache gets 8,192 "
        "tokens a replica, 128.0 requests of 64",
        "                    0     0-1  0.8 MiB          0.0 MiB    4.0 MiB     14.9 MiB",
        "ok  tokenizer   TokenizersBackend, 15 tokens, with chat template",
        "                row 1 (row-1): unknown key 'temprature': did you mean 'temperature'?",
        "                row 2 (c): the row has neither prompt nor messages, no keys at all",
        "                row 4 (row-4): unknown key 'temprature': did you mean 'temperature'?",
        "ok  output      new/out.jsonl: _ GiB free",
        "ok  logs        runs/<SLURM job id, or start time and process>/logs/rank-<n>.log",
    ):
        assert f"{line}\n" in told, told
    assert "in.jsonl: about 2,7" in told and "; of the first 2,000 1,333 will be error lines\n" in told
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_second_beginning_of_sequence_is_told(run: Run, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "Qwen3ForCausalLM", vocab_size=269)
    make_tokenizer(tmp_path / "model")
    write_rows(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in ("a", "<bos>b", "<bos>c")])
    status, out, _ = run("model.path=model", "device=cpu", "input=in.jsonl")
    assert status == 0 and f"warning: {BEGUN_TWICE.format(2)}\n" in out


def test_only_what_is_given_is_checked(run: Run, tmp_path: Path) -> None:
    """For GPUs that this machine lacks; of a model that has neither weights nor a tokenizer."""
    status, out, err = run("topology.pp=8", "topology.tp=2", "model=qwen3_8b", "device=cuda", "run_dir=here")
    assert status == 0 and err == ""
    assert "processes: 16 (dp 1 x pp 8 x tp 2), device: cuda\n" in out
    assert "none: random weights (model.load_format=dummy)\n" in out and "none: prompts must be token ids\n" in out
    if not torch.cuda.is_available():
        assert "no GPU is here and preflight.device_memory (GiB) isn't set" in out
    assert re.search(r"\n +7 +\d+-35 ", out)
    assert "logs        here/logs/rank-<n>.log\n" in out
    assert "input" not in out and "output" not in out and not [*tmp_path.iterdir()]


def test_memory_that_does_not_suffice(run: Run) -> None:
    model = ("model=qwen3_8b", "preflight.device_memory=12")
    told = refused(run, "topology=pp2", *model)
    assert (
        "stage 0 (layers 0-18) needs 11.0 GiB: weights 8.0 GiB, the KV cache of one request of 40960 tokens 3" in told
    )
    assert "the smallest GPU (preflight.device_memory=12) has 12.0 GiB, 1.0 GiB of it taken" in told
    for advice in told.rpartition("use ")[2].split(" or "):
        status, out, err = run("topology=pp2", *model, advice)
        assert status == 0 and err == "" and "12.0 GiB for each rank (preflight.device_memory=12)" in out
    _, out, _ = run("topology=pp2", "model=qwen3_8b", "preflight.device_memory=16")
    assert "\n                warning: activations on stage 0 (layers 0-18) may take 2." in out
    assert refused(run, "model=demo", "preflight.device_memory=0") == (
        "preflight.device_memory=0.0 must be more than 0, in GiB"
    )


def test_checkpoints_that_are_broken(run: Run, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "Qwen3ForCausalLM")
    given = ("topology=pp2", "model.path=model", "device=cpu")
    status, out, _ = run(*given)
    assert status == 0 and "none: prompts must be token ids" in out
    file = Path(path) / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.3.mlp.up_proj.weight"
    for tensors, message in (
        (
            {key: tensor for key, tensor in whole.items() if key != name},
            "model lacks layers.3.mlp.up_proj.weight, which Qwen3ForCausalLM needs on stage 1 (layers 2-3)",
        ),
        (whole | {"model.extra": torch.zeros(1)}, "model holds model.extra, which Qwen3ForCausalLM with this config"),
        (whole | {name: torch.zeros(96, 65)}, f"{name} has shape (96, 65), config.json implies (96, 64)"),
    ):
        save_file(tensors, file)
        assert message in refused(run, *given)
    save_file(whole, file)
    file.write_bytes(file.read_bytes()[:-100])
    assert "model/model.safetensors cannot be read" in refused(run, *given)
    file.unlink()
    assert "model has no *.safetensors" in refused(run, *given)
    (file.parent / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json cannot be read: KeyError('weight_map')" in refused(run, *given)


def test_tokenizers_that_are_broken(run: Run, tmp_path: Path) -> None:
    path = Path(write_checkpoint(tmp_path / "model", "Qwen3ForCausalLM"))
    (path / "tokenizer.json").write_text("{")
    assert "no tokenizer could be loaded from model: " in refused(run, "model.path=model", "device=cpu")
    (path / "tokenizer.json").unlink()
    (path / "generation_config.json").write_text("[]")
    assert "generation_config.json of model is not a JSON object" in refused(run, "model.path=model", "device=cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["topology.pq=2"], "Could not override 'topology.pq': Key 'pq' not in 'TopologyConfig'"),
        (["topology.pp=5"], "topology.pp=5 needs at least 5 layers, the model has 4"),
        (["topology=pp2", "scheduler.max_num_seqs=1"], "scheduler.max_num_seqs=1 is less than topology.pp=2"),
        (["model.path=null"], "model.path is not set"),
        (["sampling.top_p=2"], "top_p=2"),
        (["input=none.jsonl"], "input=none.jsonl can't be read: No such file or directory"),
        (["input=bad.jsonl"], "input=bad.jsonl: none of its first 2 rows can be answered; row 0 (row-0): the line is "),
        (["output=."], "output=. is a directory"),
        (["input=in.jsonl", "output=in.jsonl"], "output=in.jsonl is the input: it would be overwritten"),
        (["output=in.jsonl/out.jsonl"], "output=in.jsonl/out.jsonl can't be written: "),
        (["run_dir=in.jsonl"], "run_dir=in.jsonl can't be written: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(run: Run, tmp_path: Path, overrides: list[str], message: str) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "1+2="}])
    (tmp_path / "bad.jsonl").write_text("1+2=\n2+3=\n")
    assert message in refused(run, "model=demo", "device=cpu", *overrides)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folders_that_may_not_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    told = refused(run, "model=demo", "device=cpu", "output=closed/out.jsonl")
    assert told.startswith("output=closed/out.jsonl can't be written: ") and told.endswith("Permission denied")


def test_an_output_that_a_run_cannot_go_on_from(run: Run, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "1+2=", "max_tokens": 4}])
    given = ("model=demo", "device=cpu", "input=in.jsonl", "output=out.jsonl")
    assert run_here(*given, "run_dir=run", "progress=false") == 0
    made = {file: file.read_bytes() for file in tmp_path.glob("out*")}
    assert "output      out.jsonl: " in run(*given)[1]
    told = refused(run, *given, "sampling.seed=5")
    assert told.startswith("output=out.jsonl: out.jsonl.journal was made with model.path=")
    assert "sampling.seed was 0, is 5; choose another output, or resume=fresh" in told
    assert run(*given, "sampling.seed=5", "resume=fresh")[0] == 0
    assert {file: file.read_bytes() for file in tmp_path.glob("out*")} == made, "it only looks"
    (tmp_path / "out.jsonl.journal").unlink()
    assert refused(run, *given).startswith("output=out.jsonl exists without out.jsonl.journal, which a run leaves")


def test_a_shard_has_an_output_of_its_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out-00001-of-00003.jsonl").touch()
    _, out, _ = run("model=demo", "device=cpu", "output=out.jsonl", "shard=[1,3]")
    assert "output      out-00001-of-00003.jsonl: " in out and out.count("; answers of an earlier run are there\n") == 1


def test_inputs_of_other_kinds_are_looked_at_too_but_for_streams(run: Run, tmp_path: Path) -> None:
    rows = [{"prompt": "1+2="}, {"prompt": "1+2=", "temprature": 0}]
    (tmp_path / "a.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    (tmp_path / "b.jsonl").write_text('{"prompt": "3+4="}\n')
    _, out, _ = run("model=demo", "device=cpu", "input=[a.gz,b.jsonl]")
    assert "input       2 files: 3 rows, 0.0 MiB; of the first 3 1 will be error lines\n" in out
    _, out, _ = run("model=demo", "device=cpu", "input=-")
    assert "input       -: not looked at, for it can be read only once\n" in out
    (tmp_path / "a.gz").write_bytes(gzip.compress(json.dumps(rows).encode())[:-9])
    assert refused(run, "model=demo", "device=cpu", "input=a.gz").startswith("input=a.gz can't be read: Compressed")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gz", "b.jsonl"]


def test_a_table_of_answers_is_looked_at_where_it_will_be(run: Run, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in.jsonl").write_text('{"prompt": "3+4="}\n')
    _, out, _ = run("model=demo", "device=cpu", "input=in.jsonl", "output=out.parquet")
    assert "output      out.parquet: " in out
    parquet.write_table(pytest.importorskip("pyarrow").table({"prompt": ["1+1="]}), tmp_path / "out.parquet")
    told = refused(run, "model=demo", "device=cpu", "input=in.jsonl", "output=out.parquet")
    assert told.startswith("output=out.parquet exists and was made by no run")
    _, out, _ = run("model=demo", "device=cpu", "input=out.parquet")
    assert "out.parquet: 1 rows, 0.0 MiB; of the first 1 0 will be error lines\n" in out
    assert "prompt from column prompt\n" in out
