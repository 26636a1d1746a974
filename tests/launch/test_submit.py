"""What `make slurm` would submit, and what the job makes of what it got."""

import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
SBATCH = str(ROOT / "launch" / "slurm.sbatch")
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "2"}
Dry = Callable[..., list[str]]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dry:
    """The words that a dry run prints."""
    monkeypatch.setattr(sys, "argv", ["submit.py"])
    monkeypatch.setenv("SPMD_HOME", str(ROOT))

    def dry(*words: str) -> list[str]:
        assert script("submit").main([*words, "DRY_RUN=1"]) == 0
        command, config = capsys.readouterr().out.split("\n\n", 1)
        assert OmegaConf.select(OmegaConf.create(config), "topology.pp") == 2
        return shlex.split(command)

    return dry


def test_a_nodes_ranks_are_torchruns(dry: Dry) -> None:
    overrides = ["topology=pp2dp2", "sampling.stop=['a b',\"c=d\"]", "input=my file.jsonl"]
    command = dry(
        "NODES=2", "GPUS=2", "TIME=04:00:00", "PARTITION=gpu", "NAME=x", "SBATCH=--qos=high --mem=0", *overrides
    )
    assert command[0] == "sbatch" and command[command.index(SBATCH) + 1 :] == overrides
    assert {
        *("--job-name=x", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=8"),
        *("--time=04:00:00", "--partition=gpu", "--output=runs/slurm-%j.out", "--qos=high", "--mem=0"),
    } <= set(command)
    assert not any(word.startswith(("--account", "--array")) for word in command)


def test_srun_may_start_each_rank(dry: Dry) -> None:
    command = dry("NODES=2", "GPUS=2", "NATIVE=1", "CPUS=3", "ARRAY=8%2", "topology=pp2dp2")
    assert {"--ntasks-per-node=2", "--cpus-per-task=3", "--array=0-7%2", "--output=runs/slurm-%A_%a.out"} <= set(
        command
    )
    assert f"--export=ALL,SPMD_HOME={ROOT},PYTHON={sys.executable},SPMD_NATIVE=1" in command


def test_without_gpus(dry: Dry) -> None:
    command = dry("GPUS=0", "PROCS=2", "topology=pp2")
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=2"} <= set(command)
    assert next(word for word in command if word.startswith("--export")).endswith(",SPMD_NATIVE=0,SPMD_PROCS=2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["NODES=2", "GPUS=4", "topology=pp2dp2"], "needs 4 processes, NODES=2 x GPUS=4 gives 8; change the topology"),
        (["PROCS=4", "topology=pp2"], "needs 2 processes, NODES=1 x PROCS=4 gives 4; change the topology"),
        (["GPUS=2", "topology=pp2", "scheduler.max_num_seqs=1"], "scheduler.max_num_seqs=1 is less than topology.pp=2"),
        (["GPUS=5", "topology.pp=5", "model=demo"], "topology.pp=5 needs at least 5 layers, the model has 4"),
        (["GPUS=2", "topology.pq=2"], "Could not override 'topology.pq'"),
        (["NODE=2"], "unknown NODE; the job's options are NODES, GPUS, PROCS"),
        (["NODES=two"], "NODES=two is not a number, at least 1"),
        (["NODES=0"], "NODES=0 is not a number, at least 1"),
        (["GPUS=8", "PROCS=8"], "GPUS or PROCS"),
        (["GPUS=0"], "GPUS=0 needs PROCS"),
        (["ARRAY=0-3"], "ARRAY=0-3 is no number of parts"),
        (["GPUS=1", "ARRAY=2", "shard=[0,2]"], "shard=[0, 2] with ARRAY=2"),
    ],
)
def test_mistakes_are_reported_before_anything_is_submitted(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["submit.py"])
    with pytest.raises(ValueError) as error:
        script("submit").main(words)
    assert message in str(error.value)


def test_no_sbatch_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["submit.py"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no sbatch here"):
        script("submit").main(["PROCS=1"])


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """What launch/allocation.py finds out in a job."""

    def settle(*overrides: str, **environ: str) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["allocation.py", *overrides])
        for name, value in (JOB | environ).items():
            monkeypatch.setenv(name, value)
        settled: dict[str, str] = script("allocation").settle()
        return settled

    return settle


def test_a_job_finds_out_what_it_runs(settled: Callable[..., dict[str, str]]) -> None:
    found = settled("topology=pp2dp2")
    assert 10_000 <= int(found.pop("port")) < 30_000
    assert found == {"native": "0", "per_node": "2", "run_dir": "runs/7", "overrides": "()"}
    assert settled("topology=pp2dp2", "run_dir=my runs")["run_dir"] == "'my runs'"


def test_a_task_of_an_array_has_a_part_and_a_folder_of_its_own(settled: Callable[..., dict[str, str]]) -> None:
    values = {"ID": "3", "MIN": "2", "MAX": "4", "STEP": "1", "COUNT": "3"}
    task = {"SLURM_NTASKS": "4"} | {f"SLURM_ARRAY_TASK_{name}": value for name, value in values.items()}
    found = settled("topology=pp2dp2", **task)
    assert (found["native"], found["run_dir"], found["overrides"]) == ("1", "runs/7", "('shard=[1,3]')")
    found = settled("topology=pp2dp2", "run_dir=my runs", **task)
    assert shlex.split(found["overrides"].strip("()")) == ["shard=[1,3]", "run_dir='my runs/1'"]
    with pytest.raises(ValueError, match=r"shard=\[0, 3\] in a job array"):
        settled("topology=pp2dp2", "shard=[0,3]", **task)


def test_a_job_of_another_size_is_refused(settled: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="needs 2 processes, the job's 2 nodes x 2 processes gives 4"):
        settled("topology=pp2")
    with pytest.raises(ValueError, match="needs at least 4 layers, the model has 3"):
        settled("topology=pp4", "model=demo", "+model.overrides.num_hidden_layers=3")
