import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPOLOGIES = ["pp2", "pp4", "dp2", "tp2", "pp2dp2", "pp2tp2"]


def make(*args: str) -> str:
    outer_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS", "VENV")
    env = {key: value for key, value in os.environ.items() if key not in outer_make}
    done = subprocess.run(["make", "-C", ROOT, "--no-print-directory", *args], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_is_the_default_and_lists_every_target() -> None:
    listed = make()
    assert listed == make("help")
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared is not None
    targets = {name for line in listed.splitlines() for name in line.split("  ")[1].split()}
    assert targets == set(declared[1].split())
    assert targets >= {"setup", "demo", "test", "bench", "preflight", "slurm", "lint", "clean", *TOPOLOGIES}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_topology_targets_name_their_config(topology: str, venv: Path) -> None:
    assert (ROOT / "conf" / "topology" / f"{topology}.yaml").exists()
    printed = make("-n", topology, f"VENV={venv}", "ARGS=model.path=DIR input=in.jsonl output=out.jsonl")
    assert f"launch/local.sh topology={topology} model.path=DIR input=in.jsonl output=out.jsonl" in printed


def test_overrides_survive_make_and_the_shell(venv: Path) -> None:
    given = """topology.layers=[3,1] input=*.md 'sampling.stop=["a b","$x"]' 'output=${input}.out' "run_dir=my runs" """
    lines = make("pp2", f"VENV={venv}", f"ARGS={given}").splitlines()
    start = lines.index("topology=pp2")
    assert lines[start + 1 : start + 6] == [
        "topology.layers=[3,1]",
        "input=*.md",
        'sampling.stop=["a b","$x"]',
        "output=${input}.out",
        "run_dir=my runs",
    ]


def test_bench_runs_the_bench(venv: Path) -> None:
    lines = make("bench", f"VENV={venv}", "ARGS=topology=pp2").splitlines()
    assert lines[lines.index("spmd.bench") + 1] == "topology=pp2"


def test_preflight_checks_without_ranks(venv: Path) -> None:
    lines = make("preflight", f"VENV={venv}", "ARGS=topology=pp4").splitlines()
    assert lines[:3] == ["-m", "spmd.preflight", "topology=pp4"]


def test_what_stands_beside_args_is_about_the_slurm_job(venv: Path) -> None:
    comment = "a 'b' $x"
    args = """topology=pp2 input=*.md 'sampling.stop=["a b","$x"]'"""
    words = ["NODES=2", "PROCS=1", "DRY_RUN=1", f"SBATCH=--comment={shlex.quote(comment)}", f"ARGS={args}"]
    command = shlex.split(make("slurm", f"VENV={venv}", *words).partition("\n")[0])
    assert {"--nodes=2", f"--comment={comment}"} <= set(command)
    assert command[-3:] == ["topology=pp2", "input=*.md", 'sampling.stop=["a b","$x"]']


def test_no_python_new_enough_is_said_clearly(tmp_path: Path) -> None:
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("python3", "python3.11"):
        (old / name).write_text("#!/bin/sh\nexit 1\n")
        (old / name).chmod(0o755)
    for tool in ("make", "sh", "mkdir", "touch"):
        path = subprocess.run(["which", tool], check=True, capture_output=True, text=True).stdout.strip()
        (old / tool).symlink_to(path)
    done = subprocess.run(
        ["make", "-C", ROOT, "setup", f"VENV={tmp_path}/venv"], env={"PATH": str(old)}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no Python 3.11 or later found on PATH" in done.stderr
    assert not (tmp_path / "venv").exists()
