"""Traces of ticks, of a loop made up here and of the main job."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spmd.config import ProfileConfig
from spmd.report.profile import profiled
from tests.support.jobs import run_here, write_rows
from tests.support.ranks import Ranks


def names(trace: Path) -> list[str]:
    """Names of the operators recorded, in order of time."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    return [event["name"] for event in sorted(operators, key=lambda event: event["ts"])]


def loop(ticks: int, config: ProfileConfig, folder: Path) -> None:
    """A loop whose tick t multiplies t by t matrices."""
    with profiled(config, folder, rank=3) as watch:
        for tick in range(ticks):
            matrix = torch.ones(tick, tick)
            (torch.mm if tick % 2 else torch.add)(matrix, matrix)
            watch(None)


@pytest.mark.parametrize(("first", "end", "recorded"), [(0, 1, ["aten::add"]), (2, 4, ["aten::add", "aten::mm"])])
def test_the_ticks_asked_for_are_recorded(tmp_path: Path, first: int, end: int, recorded: list[str]) -> None:
    loop(10, ProfileConfig([first, end]), tmp_path)
    found = names(tmp_path / "profile" / "trace-rank-3.json.gz")
    assert [name for name in found if name in ("aten::add", "aten::mm")] == recorded


def test_a_loop_that_ends_early_leaves_what_there_was(tmp_path: Path) -> None:
    loop(4, ProfileConfig([3, 99]), tmp_path)
    assert "aten::mm" in names(tmp_path / "profile" / "trace-rank-3.json.gz")


def test_ticks_that_never_come_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop(4, ProfileConfig([9, 10]), tmp_path)
    assert "profile.ticks=[9, 10]: nothing recorded, the run had 4 ticks" in caplog.text
    assert not list((tmp_path / "profile").iterdir())


def test_nothing_is_made_unless_asked_for(tmp_path: Path) -> None:
    loop(4, ProfileConfig(), tmp_path)
    assert not list(tmp_path.iterdir())


def on_rank(rank: int, *overrides: str) -> int:
    return run_here(*overrides)


def test_every_rank_of_a_job_leaves_a_trace(ranks: Ranks, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"{i}+{i}="} for i in range(8)]
    write_rows(tmp_path / "in.jsonl", rows)
    files = (f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out.jsonl'}", f"run_dir={tmp_path / 'run'}")
    job = ("model=demo", "topology=pp2", "progress=false", "profile.ticks=[1,3]", "device=cpu", *files)
    assert ranks.run(2, on_rank, *job) == [0, 0]
    traces = sorted((tmp_path / "run" / "profile").iterdir())
    assert [trace.name for trace in traces] == ["trace-rank-0.json.gz", "trace-rank-1.json.gz"]
    first, last = (names(trace) for trace in traces)
    assert "aten::embedding" in first and "aten::argmax" in last
    assert len(read_log(tmp_path, 0)) == len(read_log(tmp_path, 1)) == 1


def read_log(folder: Path, rank: int) -> list[str]:
    """Lines about start-up."""
    text = (folder / "run" / "logs" / f"rank-{rank}.log").read_text()
    return [line for line in text.splitlines() if "start-up: imports" in line]
