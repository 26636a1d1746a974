"""Runs the main job as a person does: in processes started by torchrun or by the launcher, or, cheaper, in this one."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spmd.config import Config
from spmd.generate import generate
from spmd.processes.feeder import Feeder
from spmd.processes.outlet import Outlet
from spmd.runtime.main import main
from spmd.signals import Stop
from spmd.topology import Topology

ROOT = Path(__file__).parents[2]
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHON": sys.executable,
    "PYTHONUNBUFFERED": "1",  # as under the launchers
}


def torchrun(ranks: int, *overrides: str) -> list[str]:
    """The raw command line."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "spmd.generate", *overrides]


def launcher(*overrides: str) -> list[str]:
    """The same through the script that counts the processes."""
    return [str(ROOT / "launch" / "local.sh"), *overrides]


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a job in `folder` to its end."""
    env = os.environ | ONE_THREAD
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start a job in `folder`, in a session of its own."""
    pipe = subprocess.PIPE
    env = os.environ | ONE_THREAD
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def generate_here(config: Config, topology: Topology, stop: Stop) -> None:
    """The main job, with its feeder and outlet forked from this process."""
    with Feeder() as feeder, Outlet() as outlet:
        generate(config, topology, stop, feeder, outlet)


def run_here(*overrides: str, work: Callable[[Config, Topology, Stop], None] = generate_here) -> int:
    """Run a job as the one rank of this process, which it leaves as it found it; returns the exit status."""
    argv, threads = sys.argv, torch.get_num_threads()
    log = logging.getLogger("spmd")
    try:
        sys.argv = ["generate.py", *overrides]
        torch.set_num_threads(1)
        main(work)
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for handler in log.handlers[:]:
            log.removeHandler(handler)
            handler.close()


def alive(pid: int) -> bool:
    """Whether a process runs; of one that has ended and that nobody waited for, the command line is empty."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def bodies(file: Path) -> dict[str, dict[str, Any]]:
    """The answers by custom_id, as the body that a client would have got."""
    return {row["custom_id"]: row["response"]["body"] for row in read_rows(file)}
