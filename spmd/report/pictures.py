"""The report's pictures as PNG and SVG, for documents, where matplotlib is installed (extra `report`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spmd.report.page import COLORS
from spmd.report.parts import NAMES, Cut
from spmd.report.series import Series, latencies, of_replicas, running_and_waiting, throughput
from spmd.trace.timeline import RankTrace

MISSING = "none; they need matplotlib, which is not installed: pip install matplotlib, or the extra report"
BINS = 400  # of a timeline
KINDS = ("png", "svg")


def draw(
    traces: Sequence[RankTrace], cuts: Sequence[Cut], end: int, figures: Mapping[str, Any] | None, folder: Path
) -> str:
    """Draw all pictures into a folder; returns where they are, or why there are none."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return MISSING
    folder.mkdir(exist_ok=True)
    for name, picture in {
        "timeline": _timeline(Figure, traces, cuts, end),
        "shares": _shares(Figure, traces, cuts),
        "throughput": _lines(Figure, throughput(traces, end), "output tokens/s"),
        "requests": _lines(Figure, running_and_waiting(traces, end), "requests"),
        "queues": _lines(Figure, of_replicas(traces, end, "waiting"), "waiting requests"),
        **({"latencies": _latencies(Figure, latencies(figures))} if figures else {}),
    }.items():
        for kind in KINDS:
            picture.savefig(folder / f"{name}.{kind}", dpi=150, bbox_inches="tight")
    return str(folder)


def _timeline(figure: Any, traces: Sequence[RankTrace], cuts: Sequence[Cut], end: int) -> Any:
    """A line for each rank, in which the height of a color is its share of the time."""
    picture = figure(figsize=(12, 1 + 0.45 * len(traces)), layout="constrained")
    edges = np.linspace(0, end, BINS + 1)
    all_axes = picture.subplots(len(traces), 1, sharex=True, squeeze=False)[:, 0]
    for axes, trace, cut in zip(all_axes, traces, cuts, strict=True):
        shares = cut.seconds(edges) / (end / BINS / 1e9)
        axes.stackplot(edges[:-1] / 1e9, shares.T, colors=[COLORS[name] for name in NAMES], step="post", linewidth=0)
        axes.set(ylim=(0, 1), xlim=(0, end / 1e9), yticks=[])
        axes.set_ylabel(trace.name, rotation=0, ha="right", va="center", fontsize=8)
    all_axes[-1].set_xlabel("seconds")
    _legend(picture, all_axes[0])
    return picture


def _shares(figure: Any, traces: Sequence[RankTrace], cuts: Sequence[Cut]) -> Any:
    picture = figure(figsize=(9, 1 + 0.35 * len(traces)), layout="constrained")
    axes = picture.subplots()
    shares = np.array([100 * cut.total() / cut.total().sum() for cut in cuts])
    left = np.zeros(len(traces))
    for part, name in enumerate(NAMES):
        axes.barh(range(len(traces)), shares[:, part], left=left, color=COLORS[name], height=0.85)
        left += shares[:, part]
    axes.set(xlim=(0, 100), xlabel="% of the time")
    axes.set_yticks(range(len(traces)), [trace.name for trace in traces], fontsize=8)
    axes.invert_yaxis()
    _legend(picture, axes)
    return picture


def _legend(picture: Any, axes: Any) -> None:
    boxes = [axes.bar(0, 0, color=COLORS[name], label=name.replace("_", " ")) for name in NAMES]
    picture.legend(
        handles=boxes, ncols=len(NAMES), loc="outside upper center", fontsize=7, frameon=False, columnspacing=1
    )


def _lines(figure: Any, series: Series, label: str) -> Any:
    picture = figure(figsize=(8, 3))
    axes = picture.subplots()
    for name, (seconds, values) in series.items():
        axes.plot(seconds, values, label=name, linewidth=1)
    axes.set(xlabel="seconds", ylabel=label)
    axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend(fontsize=7, frameon=False, ncols=4)
    return picture


def _latencies(figure: Any, found: Mapping[str, Sequence[tuple[float, float, float]]]) -> Any:
    picture = figure(figsize=(10, 5), layout="constrained")
    for axes, (name, bins) in zip(picture.subplots(2, 2).flat, found.items(), strict=True):
        if bins:
            begins, ends, counts = zip(*bins, strict=True)
            axes.bar(begins, counts, width=np.subtract(ends, begins), align="edge")
            axes.set_xscale("log")
        axes.set(title=name, xlabel="ms")
    return picture
