"""The report of a run: what it says of a real one, of a killed one, of a long one, and of none."""

import gzip
import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spmd.report import page, perfetto
from spmd.report.__main__ import main, report
from spmd.report.charts import nice, ticks
from spmd.report.parts import NAMES, cut
from spmd.topology import Topology
from spmd.trace.phases import Phase
from spmd.trace.timeline import read
from tests.support.jobs import run_here, write_rows
from tests.support.ranks import Ranks
from tests.support.traces import make_traces


def on_rank(rank: int, *overrides: str) -> int:
    return run_here(*overrides)


def run(ranks: Ranks, folder: Path, topology: str, size: int, *overrides: str) -> Path:
    """The run directory of a job of 40 sums, of lengths that let requests end at different ticks."""
    rows: list[dict[str, Any]] = [{"prompt": f"{i}+{i * 7}=", "max_tokens": 2 + i % 7} for i in range(40)]
    write_rows(folder / "in.jsonl", rows)
    job = (f"input={folder / 'in.jsonl'}", f"output={folder / 'out.jsonl'}", f"run_dir={folder / 'run'}")
    asked = (f"topology={topology}", "model=demo", "device=cpu", "progress=false", "scheduler.max_num_seqs=8")
    assert ranks.run(size, on_rank, *job, *asked, *overrides) == [0] * size
    return folder / "run"


@pytest.fixture(scope="module")
def traced(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(ranks, tmp_path_factory.mktemp("traced"), "pp2dp2", 4, "trace=true")


def test_the_account_of_a_real_run_adds_up_and_its_trace_says_the_same(traced: Path) -> None:
    figures = json.loads((traced.parent / "out.summary.json").read_text())
    stages = figures["stage_time_percent"]
    assert len(stages) == 2
    for stage, parts in enumerate(stages):
        assert sum(parts.values()) == pytest.approx(100, abs=1)
        busy = sum(parts[part] for part in ("forward", "sample", "padding", "dummy"))
        assert busy == pytest.approx(figures["stage_busy_percent"][stage])
        assert parts["forward"] > 0 and parts["host"] > 0 and parts["dummy"] == 0
    assert stages[1]["sample"] > stages[0]["sample"] and stages[1]["hidden_wait"] > stages[0]["hidden_wait"]

    traces = read(traced / "trace")
    end = max(int(trace.host.ends[-1]) for trace in traces)
    for stage in (0, 1):
        of_ranks = [cut(trace, end).total() for trace in traces if trace.about["pp_rank"] == stage]
        shares = 100 * np.sum(of_ranks, 0) / np.sum(of_ranks)
        off = {name: share - stages[stage][name] for name, share in zip(NAMES, shares, strict=True)}
        assert max(map(abs, off.values())) < 8, off  # the run goes on a moment after the loop, until all is written
    assert sum(int(trace.counts["tokens"].sum()) for trace in traces) == 2 * figures["total_output_tokens"]


def test_ticks_of_all_ranks_are_alike_and_in_order(traced: Path) -> None:
    traces = read(traced / "trace")
    assert [trace.rank for trace in traces] == [0, 1, 2, 3]
    assert len({len(trace.counts) for trace in traces}) == 1
    for first, second in ((traces[0], traces[1]), (traces[2], traces[3])):
        for name in ("rows", "padding", "decodes", "samples", "prompt_tokens", "tokens"):
            assert (first.counts[name] == second.counts[name]).all(), name
        ran = first.counts["rows"] > 0
        place = first.host.phases.index(Phase.FORWARD)
        begins = [(t.host.starts + t.host.durations[:, :place].sum(1))[ran] for t in (first, second)]
        assert (begins[1] > begins[0]).all(), "no stage computes before the one that it gets hidden states from"


def events(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    return found


def test_perfetto_gets_spans_that_follow_one_another(traced: Path) -> None:
    report(traced)
    found = events(traced)
    for rank in range(4):
        spans = [event for event in found if event["ph"] == "X" and event["pid"] == rank]
        assert {"forward", "commit", "schedule"} <= {span["name"] for span in spans}
        assert ("hidden" in {span["name"] for span in spans}) == (rank % 2 == 1)
        for one, other in pairwise(spans):
            assert one["ts"] + one["dur"] <= other["ts"] + 2 and one["args"]["tick"] <= other["args"]["tick"]
    forwards = [event for event in found if event.get("name") == "forward"]
    assert all(0 <= event["args"]["padding"] < event["args"]["rows"] for event in forwards)
    assert {event["args"]["slot"] for event in forwards} == {0, 1}
    assert {event["pid"] for event in found if event["ph"] == "C"} == {1, 3}, "leaders count"


def test_the_page_needs_nothing_but_itself(traced: Path) -> None:
    told = report(traced)
    text = (traced / "report.html").read_text()
    assert any("report.html" in line for line in told) and "4 ranks" in told[0]
    assert not re.search(r"https?:|src=|href=|@import|url\(|import\(|fetch\(", text)
    assert not re.search(r"<!--[A-Z]+-->", text), "all is filled in"
    for title in ("Output tokens", "Waiting in each replica", "TTFT", "E2EL", "stage 1", "rank 3 dp1/pp1/tp0"):
        assert title in text, title
    data = json.loads(re.findall(r'type="application/json">(.*?)</script>', text, re.S)[0])
    assert len(data["ranks"]) == 4 and len(data["excerpts"]) == 1


def test_a_run_that_was_killed_is_reported_as_far_as_it_was_written(tmp_path: Path) -> None:
    make_traces(tmp_path / "trace", Topology(dp=1, pp=2), 600)
    (tmp_path / "trace" / "rank-1.bin").write_bytes((tmp_path / "trace" / "rank-1.bin").read_bytes()[:30_001])
    told = report(tmp_path)
    assert any("was killed or failed" in line for line in told)
    (tmp_path / "trace" / "rank-0.bin").unlink()
    assert any("1 ranks left no trace" in line for line in report(tmp_path))


def test_long_runs_get_windows_and_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_traces(tmp_path / "trace", Topology(dp=2, pp=2), 900, "cuda")
    monkeypatch.setattr(page, "MOST_SPANS", 5_000)
    monkeypatch.setattr(perfetto, "MOST_EVENTS", 5_000)
    told = report(tmp_path)
    windows = page.excerpts(read(tmp_path / "trace"))
    assert len(windows) == 3 and windows[0][0] == 0 and windows[2][1] == 900
    assert any(f"for ticks 0-{windows[0][1] - 1}," in line for line in told)
    spans = [event for event in events(tmp_path) if event["ph"] == "X"]
    assert 2_000 < len(spans) <= 5_000
    assert {event["tid"] for event in spans} == {0, 1}, "host and device"
    main([str(tmp_path), "--ticks", "10:12"])
    assert {event["args"]["tick"] for event in events(tmp_path) if event["ph"] == "X"} == {10, 11}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_of_the_time_is_cut_into_parts(tmp_path: Path, device: str) -> None:
    make_traces(tmp_path, Topology(dp=1, pp=2), 200, device)
    for trace in read(tmp_path):
        end = int(trace.lane.ends[-1]) + 10**9
        whole = cut(trace, end)
        total = dict(zip(NAMES, whole.total(), strict=True))
        begun = int(trace.lane.starts[0]) / 1e9
        assert sum(total.values()) == pytest.approx(end / 1e9 - begun, rel=1e-6)
        assert total["idle_tail"] == pytest.approx(1, abs=0.05)
        forward = trace.host.durations[:, trace.host.phases.index(Phase.FORWARD)].sum() / 1e9
        assert total["forward"] + total["padding"] == pytest.approx(forward, rel=1e-6)
        assert 0.02 * forward < total["padding"] < 0.2 * forward
        bins = whole.seconds(np.linspace(0, end, 33))
        assert bins.sum(0) == pytest.approx(whole.total(), rel=1e-6)
        if device == "cuda":
            assert total["token_wait"] > 0.01, "a third of the gaps is counted by what the host did"


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "trace=true"), (["--ticks", "9:9"], "must be A:B"), (["--ticks", "x"], "must be A:B")]
)
def test_what_cant_be_reported_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), *arguments])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_ticks_that_there_are_not_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_traces(tmp_path / "trace", Topology(), 20)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--ticks", "20:30"])
    assert capsys.readouterr().err == "error: --ticks 20:30: the trace has 20 ticks, from 0 on\n"


def test_pictures_are_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_traces(tmp_path / "trace", Topology(dp=2, pp=2), 50)
    report(tmp_path)
    names = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert {"timeline.png", "timeline.svg", "shares.png", "throughput.png", "queues.svg", "requests.png"} <= names


def test_without_matplotlib_all_else_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    make_traces(tmp_path / "trace", Topology(), 50)
    told = report(tmp_path)
    assert "matplotlib" in told[-1] and (tmp_path / "report.html").exists()
    assert not (tmp_path / "pictures").exists()


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [{"prompt": "1+2=", "max_tokens": 3}])
    job = (f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'out.jsonl'}", f"run_dir={tmp_path / 'run'}")
    assert run_here("model=demo", "device=cpu", "progress=false", *job) == 0
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["config.yaml", "logs"]


def test_axes_have_round_numbers() -> None:
    for most in (0.013, 1.0, 7.2, 480.0, 99_999.0):
        assert most <= nice(most) <= 2 * most
        marks = ticks(most)
        assert marks[0] == 0 and 3 <= len(marks) <= 8 and marks[-1] <= most
