"""The figures at the end of a run: as a dict with `vllm bench`'s names, as JSON, and as a table for people."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spmd.report.metrics import LATENCIES, Metrics

log = logging.getLogger("spmd")

FIGURES = "figures.json"  # beside a trace


def as_dict(metrics: Metrics) -> dict[str, Any]:
    """Figures of merged metrics, named as `vllm bench serve` saves them. Rates are per second of the work phase.

    `stage_time_percent` has one account a stage (`spmd.trace.account`), the mean of its ranks, whose parts make 100;
    `stage_busy_percent` is the sum of those in which the stage computed, for good or for nothing.
    A tick's host time is what its Python takes beside `Stage.run`, without waiting for samples, peers or rows.
    `idle_tail_percent` is the share of the run, mean over the replicas, that comes after a replica's last answer.
    """
    m, wall = metrics, metrics.wall_seconds
    figures: dict[str, Any] = {
        "completed": m.rows_ok,
        "failed": m.rows_failed,
        "startup_seconds": m.startup_seconds,
        "duration": wall,
        "total_input_tokens": m.prompt_tokens,
        "total_output_tokens": m.output_tokens,
        "request_throughput": _ratio(m.rows_ok, wall),
        "input_throughput": _ratio(m.prompt_tokens, wall),
        "output_throughput": _ratio(m.output_tokens, wall),
        "total_token_throughput": _ratio(m.prompt_tokens + m.output_tokens, wall),
    }
    for name in LATENCIES:
        histogram = getattr(m, name)
        figures[f"mean_{name}_ms"] = 1e3 * histogram.mean
        figures[f"median_{name}_ms"] = 1e3 * histogram.percentile(50)
        figures[f"p99_{name}_ms"] = 1e3 * histogram.percentile(99)
    return figures | {
        "median_host_ms": 1e3 * m.host.percentile(50),
        "p99.9_host_ms": 1e3 * m.host.percentile(99.9),
        "max_host_ms": 1e3 * m.host.percentile(100),
        "input_wait_seconds": m.input_wait_seconds,
        "stage_busy_percent": [100 * _ratio(account.busy, account.wall) for _, account in sorted(m.stages.items())],
        "stage_time_percent": [account.percent() for _, account in sorted(m.stages.items())],
        "preemptions": m.preemptions,
        "prefix_cache_hit_tokens": m.cache_hit_tokens,
        "prefix_cache_queried_tokens": m.cache_queried_tokens,
        "idle_tail_percent": 100 * _ratio(m.idle_seconds, m.replicas * wall),
        "frozen_ticks": m.frozen_ticks,
        "mixed_ticks": m.mixed_ticks,
        "exchanges": m.exchanges,
        "exchange_us_per_tick": 1e6 * _ratio(m.exchange_seconds, m.exchanges),
    }


def json_line(metrics: Metrics, **more: Any) -> str:
    """The figures, after `more` (what was measured, say), as one line of JSON."""
    return json.dumps(more | as_dict(metrics), allow_nan=False)


def write_json(metrics: Metrics, output: str | Path) -> Path:
    """Write the figures beside the answers, as `<output stem>.summary.json`, and return that path."""
    path = Path(output).with_suffix(".summary.json")
    path.write_text(json.dumps(as_dict(metrics), indent=2, allow_nan=False) + "\n")
    return path


def write_figures(metrics: Metrics, file: Path) -> None:
    """Write the figures with the bins of the latencies, for `python -m spmd.report`; no matter if it can't be."""
    histograms = {name: getattr(metrics, name).bins for name in LATENCIES}
    try:
        file.write_text(json.dumps(as_dict(metrics) | {"histograms": histograms}, allow_nan=False) + "\n")
    except OSError as error:
        log.warning("%s can't be written: %s", file, error.strerror)


def table(metrics: Metrics, more: Iterable[tuple[str, ...]] = ()) -> str:
    """The figures for people, in aligned columns, and rows of `more` below; no newline at the end."""
    f = as_dict(metrics)
    hits, queried = f["prefix_cache_hit_tokens"], f["prefix_cache_queried_tokens"]
    total = f["total_input_tokens"] + f["total_output_tokens"]
    rows = [
        ("rows", f"{f['completed']:,} ok", f"{f['failed']:,} failed", f"{f['request_throughput']:,.2f} req/s"),
        ("time", f"{f['duration']:,.2f} s", f"start-up {f['startup_seconds']:,.2f} s"),
        ("",),
        ("tokens", "count", "tok/s"),
        ("  input", f"{f['total_input_tokens']:,}", f"{f['input_throughput']:,.1f}"),
        ("  output", f"{f['total_output_tokens']:,}", f"{f['output_throughput']:,.1f}"),
        ("  total", f"{total:,}", f"{f['total_token_throughput']:,.1f}"),
        ("",),
        ("latency (ms)", "mean", "p50", "p99"),
        *(_latency(f, name) for name in LATENCIES),
        ("",),
        ("host (ms)", "p50", "p99.9", "longest"),
        ("  tick", *(f"{f[f'{kind}_host_ms']:,.2f}" for kind in ("median", "p99.9", "max"))),
        ("",),
    ]
    below = [
        ("row wait", f"{f['input_wait_seconds']:,.2f} s"),
        ("preempted", f"{f['preemptions']:,}"),
        ("cache hits", f"{100 * _ratio(hits, queried):.1f} %", f"{hits:,} of", f"{queried:,} tokens"),
        *(_balance(f, metrics.replicas) if metrics.replicas > 1 else ()),
        *more,
    ]
    stages = shares("stage (%)", f["stage_time_percent"])
    return "\n".join([*(_line(*row) for row in rows), *stages, "", *(_line(*row) for row in below)])


def shares(title: str, percents: Sequence[Mapping[str, float]]) -> list[str]:
    """Lines of a table of parts that make 100, one for each of `percents`, by its number; all have the same parts."""
    heads = [title, *(part.removesuffix("_wait").removesuffix("_tail") for part in next(iter(percents), ()))]
    lines = [[f"  {number}", *(f"{share:.1f}" for share in parts.values())] for number, parts in enumerate(percents)]
    return [f"{label:<14}" + "".join(f"{cell:>9}" for cell in cells) for label, *cells in (heads, *lines)]


def _latency(figures: dict[str, Any], name: str) -> tuple[str, ...]:
    return (f"  {name.upper()}", *(f"{figures[f'{kind}_{name}_ms']:,.2f}" for kind in ("mean", "median", "p99")))


def _balance(figures: dict[str, Any], replicas: int) -> list[tuple[str, ...]]:
    """What replicas have to do with one another."""
    f = figures
    return [
        ("",),
        ("replicas", "idle tail", "frozen ticks", "mixed ticks", "exchange"),
        (
            f"  {replicas}",
            *(f"{f['idle_tail_percent']:.1f} %", f"{f['frozen_ticks']:,}", f"{f['mixed_ticks']:,}"),
            f"{f['exchange_us_per_tick']:,.0f} us/tick",
        ),
    ]


def _line(label: str, *cells: str) -> str:
    return (f"{label:<14}" + "".join(f"{cell:>18}" for cell in cells)).rstrip()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
