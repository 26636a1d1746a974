"""The report of a run as one page of HTML that needs nothing else: data, charts and a timeline to zoom into.

The timeline of a long run has more ticks than a page can hold, so it has levels of detail. What is drawn of the whole
run are bins, LEVELS of them on each level, with the share that each part has of a bin; the browser takes the coarsest
level that is finer than its pixels. Phases of single ticks are there for excerpts: the whole run if its spans are at
most MOST_SPANS, else as many ticks as that allows at its beginning, in its middle and at its end.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from spmd.report import charts
from spmd.report.parts import NAMES, OF_PHASE, Cut, Floats
from spmd.report.perfetto import GAP, SHORTEST, lanes, spans
from spmd.report.series import latencies, of_replicas, running_and_waiting, throughput
from spmd.trace.phases import Phase
from spmd.trace.timeline import RankTrace

LEVELS = (1024, 16384)
MOST_SPANS = 250_000  # of all ranks
LINES = 12  # replicas that get a line each
TEMPLATE = Path(__file__).with_name("page.html")
COLORS = {
    "forward": "#3a9d5d",
    "sample": "#8cc63f",
    "padding": "#c9d8a3",
    "dummy": "#9b7fc4",
    "hidden_wait": "#d1495b",
    "token_wait": "#ef8a3c",
    "row_wait": "#b5651d",
    "exchange": "#d3a518",
    "host": "#3d7ebf",
    "idle_tail": "#c3c8ce",
}
FIGURES = (  # of the summary
    ("output_throughput", "output tokens/s"),
    ("total_token_throughput", "tokens/s in all"),
    ("request_throughput", "rows/s"),
    ("completed", "rows answered"),
    ("failed", "rows failed"),
    ("duration", "seconds"),
    ("startup_seconds", "seconds of start-up"),
    ("preemptions", "preemptions"),
    ("mixed_ticks", "mixed ticks"),
    ("frozen_ticks", "frozen ticks"),
)


def write(
    traces: Sequence[RankTrace], cuts: Sequence[Cut], end: int, figures: Mapping[str, Any] | None, file: Path
) -> None:
    """`cuts`: of the same ranks; `figures`: None if the run left none."""
    parts = {
        "TITLE": escape(title(traces)),
        "NOTES": "".join(f"<p class=note>{escape(note)}</p>" for note in notes(traces, end, figures)),
        "FIGURES": _figures(figures) if figures else "",
        "SHARES": _shares(traces, cuts),
        "CHARTS": "\n".join(_charts(traces, end, figures)),
        "DATA": json.dumps(_data(traces, cuts, end)).replace("</", "<\\/"),
    }
    page = TEMPLATE.read_text()
    for name, content in parts.items():
        page = page.replace(f"<!--{name}-->", content)
    file.write_text(page)


def title(traces: Sequence[RankTrace]) -> str:
    a = traces[0].about
    return f"dp={a['dp']} pp={a['pp']} tp={a['tp']} on {a['device']}"


def notes(traces: Sequence[RankTrace], end: int, figures: Mapping[str, Any] | None) -> list[str]:
    """What a reader has to know."""
    a, ticks = traces[0].about, max(len(trace.counts) for trace in traces)
    said = [f"{ticks:,} ticks in {end / 1e9:,.2f} s, {len(traces)} ranks, {a['slots']} micro-batches in flight."]
    if figures is None:
        said.append("The run left no figures: it goes on, was killed or failed. The trace is as far as it was written.")
    if (missing := a["dp"] * a["pp"] * a["tp"] - len(traces)) > 0:
        said.append(f"{missing} ranks left no trace.")
    if error := max(trace.about["offset_error_ns"] for trace in traces):
        said.append(f"Clocks of different hosts are laid on one another to within {error / 1e3:,.0f} us.")
    windows = excerpts(traces)
    if len(windows) > 1:
        told = ", ".join(f"{first:,}-{last - 1:,}" for first, last in windows)
        said.append(f"Single phases are shown for ticks {told}; elsewhere shares of {LEVELS[-1]:,} bins.")
    return said


def excerpts(traces: Sequence[RankTrace]) -> list[tuple[int, int]]:
    """The windows of ticks [a, b) of which all spans are in the page."""
    ticks = max(len(trace.counts) for trace in traces)
    count = sum(int((lane.durations >= SHORTEST).sum()) for trace in traces for lane in lanes(trace).values())
    if count <= MOST_SPANS:
        return [(0, ticks)]
    room = max(1, ticks * MOST_SPANS // count // 3)
    return [(0, room), ((ticks - room) // 2, (ticks + room) // 2), (ticks - room, ticks)]


def _figures(figures: Mapping[str, Any]) -> str:
    cells = [f"<div><b>{_short(figures[name])}</b><span>{label}</span></div>" for name, label in FIGURES]
    return f"<div class=figures>{''.join(cells)}</div>"


def _short(number: float) -> str:
    """With four digits at least, and no more than those behind the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def _shares(traces: Sequence[RankTrace], cuts: Sequence[Cut]) -> str:
    """A bar for each rank, and a table of the stages."""
    shares = [100 * cut.total() / cut.total().sum() for cut in cuts]
    rows = [(trace.name, share.tolist()) for trace, share in zip(traces, shares, strict=True)]
    bars = charts.stacked(rows, NAMES, [COLORS[name] for name in NAMES])
    stages: dict[int, list[Floats]] = {}
    for trace, share in zip(traces, shares, strict=True):
        stages.setdefault(trace.about["pp_rank"], []).append(share)
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in NAMES)
    body = "".join(
        f"<tr><th>stage {stage}</th>{''.join(f'<td>{share:.1f}</td>' for share in np.mean(each, 0))}</tr>"
        for stage, each in sorted(stages.items())
    )
    return f"{bars}<table><tr><th>%</th>{head}</tr>{body}</table>"


def _charts(traces: Sequence[RankTrace], end: int, figures: Mapping[str, Any] | None) -> list[str]:
    rates, queues = throughput(traces, end), of_replicas(traces, end, "waiting")
    drawn = [
        charts.lines("Output tokens", "tok/s", rates if len(rates) <= LINES else {"all": rates["all"]}),
        charts.lines("Requests running and waiting", "", running_and_waiting(traces, end)),
        charts.lines("Waiting in each replica", "", queues),
        charts.lines("Running in each replica", "", of_replicas(traces, end, "running")),
    ]
    found = latencies(figures) if figures else {}
    return drawn + [charts.histogram(name, bins) for name, bins in found.items() if bins]


def _data(traces: Sequence[RankTrace], cuts: Sequence[Cut], end: int) -> dict[str, Any]:
    windows = excerpts(traces)
    phases = [phase.name.lower() for phase in Phase]
    return {
        "end": end / 1e3,
        "parts": [{"name": name.replace("_", " "), "color": COLORS[name]} for name in NAMES],
        "phases": [*phases, GAP],
        "partOfPhase": _colors_of_phases(),
        "levels": LEVELS,
        "ranks": [_rank(trace, cut, end, windows) for trace, cut in zip(traces, cuts, strict=True)],
        "excerpts": [[first, last - 1, *_times(traces, first, last)] for first, last in windows],
    }


def _colors_of_phases() -> list[int]:
    """The part whose color each phase has, and the gap of a device."""
    return [*(OF_PHASE.get(phase, 0) for phase in Phase), NAMES.index("host")]


def _times(traces: Sequence[RankTrace], first: int, last: int) -> tuple[float, float]:
    """When a window of ticks began and ended, in microseconds."""
    have = [trace for trace in traces if len(trace.counts) > first]
    begin = min(int(trace.host.starts[first]) for trace in have)
    return begin / 1e3, max(int(trace.host.ends[:last][-1]) for trace in have) / 1e3


def _rank(trace: RankTrace, cut: Cut, end: int, windows: Sequence[tuple[int, int]]) -> dict[str, Any]:
    return {
        "name": trace.name,
        "levels": [_level(cut, end, bins) for bins in LEVELS],
        "lanes": {name: [_excerpt(trace, name, window) for window in windows] for name in lanes(trace)},
        "ticks": [_ticks(trace, window) for window in windows],
    }


def _level(cut: Cut, end: int, bins: int) -> str:
    """Shares of each bin's time, bytes [bins, parts] of 1/200."""
    seconds = cut.seconds(np.linspace(0, end, bins + 1))
    return _bytes((200 * seconds / (end / bins / 1e9)).round().clip(0, 255).astype(np.uint8))


def _excerpt(trace: RankTrace, name: str, window: tuple[int, int]) -> dict[str, str]:
    """Spans in columns: microseconds of begin and duration, phase, tick."""
    lane = lanes(trace)[name]
    begins, durations, places, ticks = spans(lane, window)
    numbers = np.array([len(Phase) if name == "device" and p is Phase.REPORT else p for p in lane.phases])
    return {
        "begin": _bytes((begins / 1e3).astype("<f8")),
        "duration": _bytes((durations / 1e3).astype("<f4")),
        "phase": _bytes(numbers[places].astype(np.uint8)),
        "tick": _bytes(ticks.astype("<u4")),
    }


def _ticks(trace: RankTrace, window: tuple[int, int]) -> str:
    """uint32 [ticks, 7] of a window: see `about` in page.html."""
    counts = trace.counts[slice(*window)]
    names = ("rows", "padding", "prompt_tokens", "decodes", "samples", "running", "waiting")
    return _bytes(np.stack([counts[name] for name in names], 1).astype("<u4"))


def _bytes(array: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
