"""What a person gets wrong at the start: one clear line from one rank, before weights load, and a non-zero exit."""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from spmd.stage import build
from tests.support.checkpoints import write_checkpoint
from tests.support.jobs import ROOT, run_here, start, torchrun, write_rows

DEMO = ROOT / "spmd" / "demo" / "model"
FILES = ("input=in.jsonl", "output=out.jsonl", "run_dir=run", "progress=false")
Told = Callable[..., str]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Told:
    """Runs a job that must fail before it loads weights; the one line it prints."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "1+2="}])
    (tmp_path / "old.jsonl").write_text("of unknown origin\n")

    def tell(*overrides: str, world_size: int = 1) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.setattr(build, "load", None)  # loading would end in a TypeError
        assert run_here(*overrides) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("error: ") and err.endswith("\n")
        assert err.count("\n") == 1, err
        assert not (tmp_path / "out.jsonl").is_file()
        return err.removeprefix("error: ").rstrip("\n")

    return tell


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["topology.pq=2"], "Could not override 'topology.pq': Key 'pq' not in 'TopologyConfig'"),
        (["+colour=red"], "unknown key 'colour', added with +"),
        (["topology.pp=two"], "Value 'two' of type 'str' could not be converted to Integer"),
        (["sampling.temperature=hot"], "Value 'hot' of type 'str' could not be converted to Float"),
        (["topology=pp3"], "Could not find 'topology/pp3': Available options in 'topology': dp2: pp2: "),
        (["in.jsonl"], "Error parsing override 'in.jsonl': missing EQUAL at '<EOF>'"),
        (["sampling.stop=[a=b]"], "no viable alternative at input '[a=': a value that holds = , ( ) or ~ needs quo"),
        (
            ["sampling.stop=[é]"],
            "sampling.stop=[é]: a value that holds é needs quotes inside those of the shell",
        ),
        (["sampling.stop=[1e3,b]"], "sampling.stop=[1e3,b]: 1000.0 is no text; quote each element"),
        (["model=/my/model"], "a folder or Hub id is given as model.path=/my/model"),
        (["tp=2"], "Key 'tp' not in 'Config': did you mean topology.tp?"),
        (["scheduler.max_num_seq=2"], "did you mean scheduler.max_num_seqs?"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["output=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["topology.pp=2"], "topology.dp=1 x topology.pp=2 x topology.tp=1 needs 2 processes, torchrun started 1"),
        (["device=tpu"], "device=tpu is not one of auto, cpu, cuda"),
        (["scheduler.num_blocks=1"], "scheduler.num_blocks=1 must be at least 2"),
        (["sampling.seed=1,2", "--multirun"], "--multirun would sweep inside every rank; sweep outside"),
        (["model.max_model_len=65"], "model.max_model_len=65 is more than the 64 positions the model was made for"),
        (["model.path=null"], "model.path is not set: give a folder with config.json, or a Hub id"),
        (["input=null"], "input and output must be set: input=prompts.jsonl output=answers.jsonl"),
        (["output=null"], "input and output must be set: input=prompts.jsonl output=answers.jsonl"),
        (["input=none.jsonl"], "input=none.jsonl can't be read: No such file or directory"),
        (["input=."], "input=. is a directory"),
        (["output=."], "output=. is a directory"),
        (["output=in.jsonl"], "output=in.jsonl is the input: it would be overwritten"),
        (
            ["output=old.jsonl"],
            "output=old.jsonl exists without old.jsonl.journal, which a run leaves beside its answer",
        ),
        (["shard=[2,2]"], "shard=[2, 2] must be null or two numbers [i, n] with 0 <= i < n"),
        (["shard=[-1,2]"], "shard=[-1, 2] must be null or two numbers"),
        (["shard=[1]"], "shard=[1] must be null or two numbers"),
        (["resume=maybe"], "resume=maybe is not one of auto, fresh, retry_errors"),
        (["run_dir=in.jsonl"], "run_dir=in.jsonl can't be written: Not a directory"),
        (["output=in.jsonl/out.jsonl"], "output=in.jsonl/out.jsonl can't be written: Not a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line(told: Told, overrides: list[str], message: str) -> None:
    assert message in told("model=demo", *FILES, *overrides)


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["topology=pp2", "scheduler.max_num_seqs=1"], 2, "scheduler.max_num_seqs=1 is less than topology.pp=2"),
        (["topology.pp=5"], 5, "topology.pp=5 needs at least 5 layers, the model has 4"),
        (
            ["topology=pp2", "topology.layers=[3,2]"],
            2,
            "must list 2 counts >= 1 (topology.pp) that sum to the model's 4",
        ),
        (["topology.tp=3"], 3, "topology.tp=3 must divide each of num_attention_heads=4, num_key_value_heads=2, int"),
        (["topology.tp=4"], 4, "topology.tp=4 must divide each of num_attention_heads=4, num_key_value_heads=2, int"),
        (["topology=tp2", "+model.overrides.intermediate_size=383"], 2, "intermediate_size=383 of Qwen3ForCausalLM"),
    ],
)
def test_a_model_that_does_not_fit_the_topology(
    told: Told, overrides: list[str], world_size: int, message: str
) -> None:
    assert message in told("model=demo", *FILES, *overrides, world_size=world_size)


def test_folders_that_hold_no_model_of_ours(told: Told, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = "model.path=model"
    assert told(path, *FILES) == "model.path=model has no config.json"
    (tmp_path / "model" / "config.json").write_text("{")
    assert told(path, *FILES).startswith("model.path=model: It looks like the config file at")
    config = json.loads((DEMO / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    unknown = told(path, *FILES)
    assert "architecture GPT2LMHeadModel is not supported; supported are LlamaForCausalLM, Mistral" in unknown


def test_a_tokenizer_that_cannot_be_loaded(told: Told, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model/tokenizer.json is a Git LFS pointer, not the file itself" in told("model.path=model", *FILES)
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert "no tokenizer could be loaded from model: " in told("model.path=model", *FILES)


def test_input_that_is_empty_or_not_readable(told: Told, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    assert told("model=demo", *FILES) == "input=in.jsonl is empty"
    if os.geteuid():  # root may read anything
        (tmp_path / "in.jsonl").chmod(0)
        assert told("model=demo", *FILES) == "input=in.jsonl can't be read: Permission denied"


def test_of_two_ranks_one_tells_and_torchrun_ends_both(tmp_path: Path) -> None:
    """The checkpoint lacks a tensor of the second stage; one rank has another configuration."""
    write_rows(tmp_path / "in.jsonl", [{"prompt": [1]}])
    write_checkpoint(tmp_path / "model", "Qwen3ForCausalLM")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    lacking = start(torchrun(2, "topology.pp=2", "model.path=model", *FILES), tmp_path)
    differing = torchrun(2, "topology.pp=2", "model.path=model", *FILES)
    place = differing.index("-m", 3)
    command = f"{sys.executable} {' '.join(differing[place:])} scheduler.max_num_seqs=$((16 + RANK))"
    differs = start([*differing[:place], "--no-python", "bash", "-c", f"exec {command}"], tmp_path)
    for job, message in (
        (lacking, "error: model lacks layers.3.mlp.up_proj.weight, which Qwen3ForCausalLM needs on stage 1"),
        (differs, "error: ranks disagree: scheduler.max_num_seqs is 17 on rank 1 ("),
    ):
        _, said = job.communicate(timeout=120)
        assert job.returncode != 0
        told = re.findall("^error: .*", said, re.MULTILINE)
        assert len(told) == 1 and told[0].startswith(message)
        assert "spmd/" not in said, "a traceback of ours"


def test_a_port_in_use(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Of ranks that srun starts; such a job is queued again, and then has another port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        assert run_here("topology=pp2", "model=demo", *FILES) == 1
    [told] = re.findall("^error: .*", capfd.readouterr().err, re.MULTILINE)
    assert told.startswith(f"error: rank 0 can't meet the others at 127.0.0.1:{port}: ") and "in use" in told


def test_help_and_the_whole_config_without_torchrun(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here("--cfg", "job", "topology=pp2", """sampling.stop=["a=b", "c|d"]""") == 0
    printed = capfd.readouterr().out
    for key in ("  path: null", "  pp: 2", "  max_num_seqs: 128", "  - a=b", "  - c|d", "output_order: input"):
        assert f"\n{key}\n" in printed
    assert run_here("-h") == 0
    printed = capfd.readouterr().out
    for key in ("topology: dp2, pp2, pp2dp2", "max_num_seqs: 128", "gpu_memory_utilization: 0.9"):
        assert key in printed
