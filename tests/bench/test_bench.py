"""The benchmark end to end, as a person starts it: its table and its line of JSON."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from spmd.bench.__main__ import bench as measure
from spmd.config import Config
from spmd.engine import Engine
from spmd.processes.feeder import Feeder
from spmd.processes.outlet import Outlet
from spmd.signals import Stop
from spmd.topology import Topology
from spmd.trace.timeline import read
from tests.support.jobs import ROOT, run, run_here
from tests.support.tiny_tokenizer import make_tokenizer

SMALL = ("model=tiny", "workload.num_prompts=6", "workload.input_len=[5,9]", "workload.output_len=[3,6]", "device=cpu")
ROOM = ("scheduler.max_num_seqs=4", "scheduler.num_blocks=64")


def bench(folder: Path, ranks: int, *overrides: str) -> list[str]:
    """What a benchmark prints."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = run([*torchrun, "-m", "spmd.bench", f"run_dir={folder / 'run'}", *SMALL, *ROOM, *overrides], folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def bench_here(config: Config, topology: Topology, stop: Stop) -> None:
    """One rank of a benchmark in this process."""
    with Feeder() as feeder, Outlet() as outlet:
        measure(config, topology, stop, feeder, outlet)


def test_figures_with_a_floor(tmp_path: Path) -> None:
    told = bench(tmp_path, 2, "topology=pp2", "bench.bandwidth=1e10", "bench.flops=1e11", "profile.ticks=[2,5]")
    figures = json.loads(told[-1])
    assert figures["completed"] == 6 and figures["pp"] == 2
    assert (figures["device_bandwidth"], figures["device_flops"]) == (1e10, 1e11)
    assert 0 < figures["floor_percent"] < 100
    assert figures["floor_output_throughput"] * figures["floor_percent"] / 100 == pytest.approx(
        figures["output_throughput"]
    )
    for stage in (0, 1):
        parts, of_floor = figures["stage_time_percent"][stage], figures["stage_floor_percent"][stage]
        assert sum(parts.values()) == pytest.approx(100, abs=1) and sum(of_floor.values()) == pytest.approx(100, abs=1)
        busy = sum(parts[part] for part in ("forward", "sample", "padding", "dummy"))
        assert busy == pytest.approx(figures["stage_busy_percent"][stage]) and min(parts.values()) >= 0
    assert max(parts["floor"] for parts in figures["stage_floor_percent"]) == pytest.approx(figures["floor_percent"])
    assert list(figures["startup_phases"]) == ["imports", "processes", "weights", "cache and kernels", "warm-up"]
    assert sum(figures["startup_phases"].values()) <= figures["startup_seconds"] * 1.000001
    assert {line.split()[0] for line in told[:-1] if line} >= {"rows", "floor", "read"}
    assert len(list((tmp_path / "run" / "profile").iterdir())) == 2


def test_a_cpu_has_no_floor_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = f"model.path={ROOT}/conf/shapes/tiny"
    assert run_here(f"run_dir={tmp_path / 'run'}", *SMALL, model, *ROOM, work=bench_here) == 0
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


def test_text_goes_from_file_to_file(tmp_path: Path) -> None:
    text = ("workload=chat_short", "workload.num_prompts=20", "workload.input_len=[50,90]", "workload.output_len=[3,6]")
    make_tokenizer(tmp_path)
    model = (f"model.path={ROOT}/conf/shapes/tiny", f"model.tokenizer={tmp_path}")
    told = bench(tmp_path, 2, "topology=dp2", *text, *model)
    figures = json.loads(told[-1])
    folder = tmp_path / "run" / "text"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == figures["completed"] == 20 and figures["failed"] == 0
    assert figures["total_output_tokens"] == sum(row["body"]["max_tokens"] for row in rows)
    assert 20 * 50 <= figures["total_input_tokens"] <= 20 * 90
    parts = [line for part in Path(folder).rglob("part-*.jsonl") for line in part.read_text().splitlines()[1:]]
    assert len(parts) == 20 and all('"chat.completion"' in part for part in parts)


def stop_at(monkeypatch: pytest.MonkeyPatch, tick: int) -> None:
    """SIGTERM reaches the process at a tick of every engine."""
    ticked = Engine.tick

    def ticks(self: Engine, number: int) -> None:
        if number == tick:
            os.kill(os.getpid(), signal.SIGTERM)
        ticked(self, number)

    monkeypatch.setattr(Engine, "tick", ticks)


RATES = ("bench.bandwidth=1e10", "bench.flops=1e11")
LONG = ("workload.num_prompts=64", "workload.output_len=[200,200]", "scheduler.num_blocks=256")


def test_a_bench_that_is_stopped_tells_no_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The floor is of the whole workload: stopped early, a run would seem to be faster than it."""
    stop_at(monkeypatch, 20)  # the warm-up takes fewer ticks
    assert run_here(f"run_dir={tmp_path}", *SMALL, *ROOM, *RATES, *LONG, work=bench_here) == 75
    told = capfd.readouterr().out.splitlines()
    figures = json.loads(told[-1])
    assert figures["completed"] < 64
    assert {figures[name] for name in ("floor_percent", "floor_output_throughput", "achieved_bandwidth")} == {None}
    assert not {"floor", "read"} & {line.split()[0] for line in told if line}
    assert any(re.match(r"stopped by SIGTERM on rank 0 with \d+ of 64 rows done: .* no floor", line) for line in told)


def test_a_bench_that_is_stopped_while_it_warms_up_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stop_at(monkeypatch, 1)
    warm_up_lasts = ("workload.input_len=[200,200]", "scheduler.max_num_batched_tokens=16")
    assert run_here(f"run_dir={tmp_path}", *SMALL, *ROOM, *RATES, *warm_up_lasts, work=bench_here) == 75
    assert capfd.readouterr().out == "stopped by SIGTERM on rank 0 while warming up: no figures\n"


def test_a_bench_that_fails_leaves_its_trace_and_no_figures_of_its_warm_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticked = Engine.tick

    def ticks(self: Engine, number: int) -> None:
        if number == 20:  # the warm-up takes fewer
            raise ZeroDivisionError
        ticked(self, number)

    monkeypatch.setattr(Engine, "tick", ticks)
    with pytest.raises(ZeroDivisionError):
        run_here(f"run_dir={tmp_path}", *SMALL, *ROOM, *LONG, "trace=true", work=bench_here)
    assert [file.name for file in (tmp_path / "trace").iterdir()] == ["rank-0.bin"]
    (trace,) = read(tmp_path / "trace")
    assert trace.counts["tick"].tolist() == list(range(20))
