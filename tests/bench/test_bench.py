"""The benchmark end to end, as a person starts it: its table and its line of JSON."""

import json
import sys
from pathlib import Path

import pytest

from spmd.bench.__main__ import bench as measure
from tests.support.jobs import ROOT, run, run_here

SMALL = ("model=tiny", "workload.num_prompts=6", "workload.input_len=[5,9]", "workload.output_len=[3,6]", "device=cpu")
ROOM = ("scheduler.max_num_seqs=4", "scheduler.num_blocks=64")


def bench(folder: Path, ranks: int, *overrides: str) -> list[str]:
    """What a benchmark prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = run([*torchrun, "-m", "spmd.bench", f"run_dir={folder / 'run'}", *SMALL, *ROOM, *overrides], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_figures_with_a_floor(tmp_path: Path) -> None:
    told = bench(tmp_path, 2, "topology=pp2", "bench.bandwidth=1e10", "bench.flops=1e11", "profile.ticks=[2,5]")
    figures = json.loads(told[-1])
    assert figures["completed"] == 6 and figures["pp"] == 2
    assert (figures["device_bandwidth"], figures["device_flops"]) == (1e10, 1e11)
    assert 0 < figures["floor_percent"] < 100
    assert figures["floor_output_throughput"] * figures["floor_percent"] / 100 == pytest.approx(
        figures["output_throughput"]
    )
    assert list(figures["startup_phases"]) == ["imports", "processes", "weights", "cache and kernels", "warm-up"]
    assert sum(figures["startup_phases"].values()) <= figures["startup_seconds"] * 1.000001
    assert {line.split()[0] for line in told[:-1] if line} >= {"rows", "floor", "read"}
    assert len(list((tmp_path / "run" / "profile").iterdir())) == 2


def test_a_cpu_has_no_floor_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = f"model.path={ROOT}/conf/shapes/tiny"
    assert run_here(f"run_dir={tmp_path / 'run'}", *SMALL, model, *ROOM, work=measure) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures["floor_percent"] is figures["floor_output_throughput"] is None
    assert figures["achieved_bandwidth"] > 0
    assert not (tmp_path / "run" / "profile").exists()


def test_replicas_share_the_rows(tmp_path: Path) -> None:
    told = bench(tmp_path, 2, "topology=dp2", "balance.gate=saturated")
    figures = json.loads(told[-1])
    assert figures["completed"] == 6 and figures["dp"] == 2
    assert figures["exchanges"] > 0 and 0 <= figures["idle_tail_percent"] < 100
    assert "replicas" in {line.split()[0] for line in told[:-1] if line}
