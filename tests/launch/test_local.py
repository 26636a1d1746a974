import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(
    *args: str, python: Path | str = sys.executable, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [ROOT / "launch" / "local.sh", *args],
        env=inherited | {"PYTHON": str(python)} | env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def processes(output: str) -> int:
    lines = output.splitlines()
    return int(lines[lines.index("--nproc-per-node") + 1])


@pytest.mark.parametrize(
    ("args", "count"),
    [
        ([], 1),
        (["topology=pp2"], 2),
        (["topology=pp4"], 4),
        (["topology=dp2"], 2),
        (["topology=tp2"], 2),
        (["topology=pp2dp2"], 4),
        (["topology=pp2tp2"], 4),
        (["topology.pp=3", "topology.dp=2"], 6),
        (["topology=pp2", "topology.tp=4"], 8),
    ],
)
def test_process_count_follows_the_config(venv: Path, args: list[str], count: int) -> None:
    done = launch(*args, python=venv / "bin" / "python")
    assert done.returncode == 0, done.stderr
    assert processes(done.stdout) == count


def test_overrides_reach_the_program_as_they_stand(venv: Path) -> None:
    overrides = ["topology=pp2", "sampling.stop=['a b',\"c=d\"]", "input=my file.jsonl", "topology.layers=[3,1]"]
    done = launch("--prog", "bench", *overrides, python=venv / "bin" / "python")
    lines = done.stdout.splitlines()
    start = lines.index("spmd.bench")
    assert lines[:2] == [str(ROOT / "launch" / "torchrun.py"), "--standalone"]
    assert lines[start + 1 : start + 5] == overrides


def test_works_from_any_folder(venv: Path, tmp_path: Path) -> None:
    done = launch("topology=pp2", "model=demo", python=venv / "bin" / "python", cwd=tmp_path)
    assert processes(done.stdout) == 2, done.stderr


def test_threads_are_shared_out_unless_set(venv: Path) -> None:
    python = venv / "bin" / "python"
    assert "OMP_NUM_THREADS=1" in launch("topology.pp=100", python=python).stdout.splitlines()
    assert "OMP_NUM_THREADS=7" in launch("topology=pp2", python=python, OMP_NUM_THREADS="7").stdout.splitlines()


def test_threads_do_not_spin_where_others_use_the_cores(venv: Path) -> None:
    """Nor is a single thread of a rank told how to wait, for it waits for nobody; what the user has set stays."""
    python, cores = venv / "bin" / "python", os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores + 1)]
    try:
        shared = launch(python=python, OMP_NUM_THREADS="2", GOMP_SPINCOUNT="").stdout.splitlines()
        alone = launch(python=python, OMP_NUM_THREADS="1").stdout.splitlines()
        asked = launch(python=python, OMP_NUM_THREADS="2", OMP_WAIT_POLICY="active").stdout.splitlines()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert "OMP_WAIT_POLICY=passive" in shared
    assert "OMP_WAIT_POLICY=" in alone
    assert "OMP_WAIT_POLICY=active" in asked


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["topology.pq=2"], "Could not override 'topology.pq'"),
        (["topology=pp9"], "Could not find 'topology/pp9'"),
        (["topology.pp=two"], "Value 'two' of type 'str' could not be converted to Integer"),
        (["topology.pp=0"], "topology.pp=0 must be at least 1"),
        (["topology.pp=4", "scheduler.max_num_seqs=2"], "scheduler.max_num_seqs=2 is less than topology.pp=4"),
        (["topology.pp=5", "model=demo"], "topology.pp=5 needs at least 5 layers, the model has 4"),
        (["topology=pp2", "model=demo", "topology.layers=[3,2]"], "topology.layers=[3, 2] has 2 stages and 5 layers"),
        (["--multirun", "topology.pp=1,2"], "one launch a point"),
        (["--prog", "server"], "--prog is generate, bench or preflight, not 'server'"),
        (["--prog"], "--prog is generate, bench or preflight, not ''"),
    ],
)
def test_config_error_is_reported_once_before_any_rank_starts(args: list[str], message: str) -> None:
    done = launch(*args)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert done.stderr.count(message) == 1


def test_printing_the_config_starts_no_ranks(venv: Path) -> None:
    done = launch("topology=pp2", "--cfg", "job", python=venv / "bin" / "python")
    assert done.stdout.splitlines()[:5] == ["-m", "spmd.generate", "topology=pp2", "--cfg", "job"]


def test_preflight_is_one_process_for_any_topology(venv: Path) -> None:
    done = launch("--prog", "preflight", "topology.pp=100", "input=my file.jsonl", python=venv / "bin" / "python")
    assert done.stdout.splitlines()[:4] == ["-m", "spmd.preflight", "topology.pp=100", "input=my file.jsonl"]


def test_size_imports_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "launch" / "size.py", "topology=pp2"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "2\n"
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "hydra" in modules
    assert "torch" not in modules


SCRIPTS = [*ROOT.glob("launch/*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
