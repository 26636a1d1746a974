"""What a report draws over the time of a run, and how often latencies occurred."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spmd.report.histogram import BINS_PER_E
from spmd.report.metrics import LATENCIES
from spmd.report.parts import Floats
from spmd.trace.timeline import RankTrace

POINTS = 300  # of a line at most
TICKS = 4  # at least, that a point of throughput is the mean of
WIDER = 20  # bins of a histogram that make one of a chart: a tenth of e each

Series = Mapping[str, tuple[Floats, Floats]]  # seconds and values, by name


def leaders(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """One rank of each replica: the leader, or where its trace is missing, another one, which counts alike."""
    found = {trace.about["dp_rank"]: trace for trace in sorted(traces, key=lambda trace: trace.is_leader)}
    return [found[replica] for replica in sorted(found)]


def throughput(traces: Sequence[RankTrace], end: int) -> Series:
    """Output tokens a second, as they were committed; of all replicas, and of each if there are several."""
    points = max(1, min(POINTS, max(len(trace.counts) for trace in traces) // TICKS))
    edges = np.linspace(0, end, points + 1)
    seconds, width = edges[1:] / 1e9, end / points / 1e9
    each = {
        f"replica {trace.about['dp_rank']}": np.histogram(trace.host.starts, edges, weights=trace.counts["tokens"])[0]
        for trace in leaders(traces)
    }
    whole = {"all": (seconds, np.sum(list(each.values()), 0) / width)}
    return whole if len(each) == 1 else whole | {name: (seconds, tokens / width) for name, tokens in each.items()}


def of_replicas(traces: Sequence[RankTrace], end: int, name: str) -> Series:
    """A count of a tick over time, of each replica."""
    at = np.linspace(0, end, POINTS)
    found = {}
    for trace in leaders(traces):
        ticks = np.searchsorted(trace.host.starts, at, side="right") - 1
        values = np.where(ticks >= 0, trace.counts[name][np.maximum(ticks, 0)], 0).astype(np.float64)
        found[f"replica {trace.about['dp_rank']}"] = (at / 1e9, values)
    return found


def running_and_waiting(traces: Sequence[RankTrace], end: int) -> Series:
    """Requests of all replicas."""
    found = {}
    for name in ("running", "waiting"):
        each = list(of_replicas(traces, end, name).values())
        found[name] = (each[0][0], np.sum([values for _, values in each], 0))
    return found


def latencies(figures: Mapping[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Of each latency (from, to, how often), in milliseconds, in ascending order."""
    return {name.upper(): _wide(figures["histograms"][name]) for name in LATENCIES}


def _wide(bins: Mapping[str, int]) -> list[tuple[float, float, float]]:
    counts: dict[int, int] = {}
    for at, count in bins.items():
        counts[int(at) // WIDER] = counts.get(int(at) // WIDER, 0) + count
    return [(_ms(at), _ms(at + 1), counts.get(at, 0)) for at in range(min(counts), max(counts) + 1)] if counts else []


def _ms(at: int) -> float:
    """Where a wide bin begins."""
    return math.exp(at * WIDER / BINS_PER_E) / 1e6
