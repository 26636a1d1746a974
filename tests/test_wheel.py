"""A built wheel in an environment of its own runs from any folder, with its configuration groups and the demo model."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.jobs import ROOT, read_rows

TIMEOUT = 300.0
DEMO = ("model=demo", "device=cpu", "sampling.max_tokens=8", "sampling.temperature=0")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment that holds the wheel; what spmd depends on is this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(copied(folder))]
    subprocess.run(build, check=True, capture_output=True, timeout=TIMEOUT)
    (wheel,) = folder.glob("spmd-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=TIMEOUT)
    python = folder / "venv" / "bin" / "python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=TIMEOUT)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # a plain folder: no .pth of it
    return python.parent


def copied(folder: Path) -> Path:
    """The files of the repository without its history, so that building leaves nothing there."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "spmd", "conf"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    return source


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as from a shell that knows nothing of the repository."""
    names = ("PYTHONPATH", "SPMD_HOME", "SPMD_CONF", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT)


def sums(folder: Path) -> tuple[str, str]:
    rows = [{"custom_id": text, "prompt": text} for text in ("12+34=", "5+6=")]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "input=in.jsonl", "output=out.jsonl"


def answers(folder: Path) -> list[str]:
    return [row["response"]["body"]["choices"][0]["text"] for row in read_rows(folder / "out.jsonl")]


def test_the_list_of_packages_is_whole() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "spmd").rglob("*.py")}
    assert set(listed) == folders | {"spmd.conf"}


@pytest.mark.parametrize("command", [["python", "-m", "spmd.generate"], ["spmd-generate"]], ids=["module", "command"])
def test_the_demo_runs_from_any_folder(installed: Path, tmp_path: Path, command: list[str]) -> None:
    done = run([str(installed / command[0]), *command[1:], *DEMO, *sums(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path) == ["46", "11"]


def test_two_stages_run_under_torchrun(installed: Path, tmp_path: Path) -> None:
    torchrun = [str(installed / "python"), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, "-m", "spmd.generate", "topology=pp2", *DEMO, *sums(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path) == ["46", "11"]


def test_preflight_bench_and_report_find_groups_shapes_and_the_page(installed: Path, tmp_path: Path) -> None:
    checked = run([str(installed / "spmd-preflight"), "model=qwen3_06b", "topology=pp4", "device=cpu"], tmp_path)
    assert checked.returncode == 0 and re.search(r"^ok  model +Qwen3ForCausalLM, 28 layers", checked.stdout, re.M)
    measured = run(
        [
            str(installed / "spmd-bench"),
            "model=tiny",
            "device=cpu",
            "workload.num_prompts=2",
            "model.max_model_len=256",
            "trace=true",
            "run_dir=run",
        ],
        tmp_path,
    )
    assert measured.returncode == 0, measured.stderr
    assert json.loads(measured.stdout.splitlines()[-1])["completed"] == 2
    reported = run([str(installed / "python"), "-m", "spmd.report", "run"], tmp_path)
    assert reported.returncode == 0 and (tmp_path / "run" / "report.html").exists(), reported.stderr
