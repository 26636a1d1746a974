import json
from pathlib import Path

import pytest

from spmd.report.metrics import Clock, Metrics
from spmd.report.summary import as_dict, json_line, table, write_figures, write_json
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams
from spmd.trace.account import PARTS, Account


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(rows_ok=1_500, rows_failed=42, preemptions=17, cache_hit_tokens=250, cache_queried_tokens=1_000)
    clock = Clock(0.0)
    for now in (2.0, 2.5, 3.0):
        metrics.sampled([clock], now)
    metrics.finished(Request(0, 0, Prompt([1] * 3_000), SamplingParams()), clock, 3.0)
    for stage, parts in enumerate(({"forward": 8.5, "sample": 0.5, "host": 1.0}, {"forward": 7.5, "hidden_wait": 2.5})):
        metrics.stopped(stage, Account(dict.fromkeys(PARTS, 0.0) | parts), wall_seconds=10.0, startup_seconds=4.0)
    metrics.input_wait_seconds = 1.5
    metrics.host.add(0.00025, 999)
    metrics.host.add(0.009)
    return metrics


def test_figures_have_vllms_names(metrics: Metrics) -> None:
    figures = as_dict(metrics)
    expected = {
        "completed": 1_500,
        "failed": 42,
        "duration": 10.0,
        "startup_seconds": 4.0,
        "request_throughput": 150.0,
        "input_throughput": 300.0,
        "output_throughput": 0.3,
        "total_token_throughput": 300.3,
        "mean_ttft_ms": 2_000.0,
        "mean_tpot_ms": 500.0,
        "mean_e2el_ms": 3_000.0,
        "preemptions": 17,
    }
    assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert figures["stage_busy_percent"] == pytest.approx([90.0, 75.0])
    first, second = figures["stage_time_percent"]
    assert sum(first.values()) == pytest.approx(100) and (first["forward"], first["host"]) == pytest.approx((85, 10))
    assert sum(second.values()) == pytest.approx(100) and second["hidden_wait"] == pytest.approx(25)
    assert figures["median_itl_ms"] == pytest.approx(500, rel=0.01)
    assert figures["p99_e2el_ms"] == pytest.approx(3_000, rel=0.01)


def test_table_holds_the_figures_in_aligned_columns(metrics: Metrics) -> None:
    lines = {line.split()[0]: line for line in table(metrics).splitlines() if line}
    for label, figures in {
        "rows": ("1,500 ok", "42 failed", "150.00 req/s"),
        "time": ("10.00 s", "start-up 4.00 s"),
        "input": ("3,000", "300.0"),
        "output": ("3", "0.3"),
        "total": ("3,003", "300.3"),
        "TTFT": ("2,000.00",),
        "TPOT": ("500.00",),
        "ITL": ("500.00",),
        "E2EL": ("3,000.00",),
        "stage": ("(%)", "forward", "padding", "dummy", "hidden", "host", "idle"),
        "0": ("85.0", "5.0", "10.0"),
        "1": ("75.0", "25.0"),
        "tick": ("0.25", "9.0"),
        "row": ("1.50 s",),
        "preempted": ("17",),
        "cache": ("25.0 %", "250 of", "1,000 tokens"),
    }.items():
        assert all(figure in lines[label] for figure in figures), lines[label]
    assert len({len(lines[label]) for label in ("rows", "latency", "TTFT", "E2EL", "cache")}) == 1


def test_replicas_have_a_line_of_their_own(metrics: Metrics) -> None:
    assert "replicas" not in table(metrics)
    metrics.replicas, metrics.idle_seconds, metrics.frozen_ticks, metrics.mixed_ticks = 2, 5.0, 1_234, 56
    metrics.exchanges, metrics.exchange_seconds = 1_000, 0.25
    figures = as_dict(metrics)
    assert figures["idle_tail_percent"] == pytest.approx(25)
    assert figures["exchange_us_per_tick"] == pytest.approx(250)
    below = table(metrics).splitlines()
    line = below[next(number for number, line in enumerate(below) if line.startswith("replicas")) + 1]
    assert line.split() == ["2", "25.0", "%", "1,234", "56", "250", "us/tick"]


def test_json_is_valid_also_when_nothing_was_done(metrics: Metrics, tmp_path: Path) -> None:
    for each in (metrics, Metrics()):
        line = json_line(each, workload="cpu")
        assert "\n" not in line
        assert json.loads(line) == {"workload": "cpu"} | as_dict(each)
        path = write_json(each, tmp_path / "answers.jsonl")
        assert path == tmp_path / "answers.summary.json"
        assert json.loads(path.read_text()) == as_dict(each)
        assert table(each)


def test_figures_of_a_trace_that_cant_be_written_are_done_without(
    metrics: Metrics, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_figures(metrics, tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())["histograms"]["ttft"]
    write_figures(metrics, tmp_path / "missing" / "figures.json")
    assert "can't be written" in caplog.text
