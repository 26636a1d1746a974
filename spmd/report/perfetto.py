"""A trace for Perfetto (https://ui.perfetto.dev) or chrome://tracing: Chrome's trace events, as JSON, compressed.

A process is a rank, with a track for its host and on GPUs one for its device; counters of a replica are its leader's.
A viewer holds some million events, so of a long run only a window of ticks is written.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spmd.trace.phases import Phase
from spmd.trace.timeline import Ints, Lane, RankTrace

MOST_EVENTS = 1_000_000
SHORTEST = 1000  # nanoseconds; shorter phases are left out
COUNTERS = ("running", "waiting", "tokens")
GAP = "idle or copies"  # of a device between two turns


def window(traces: Sequence[RankTrace], asked: tuple[int, int] | None) -> tuple[int, int]:
    """The ticks [a, b) to write: those asked for, else all, or as many as there is room for in the middle.

    Raises:
        ValueError: there are none of those asked for.
    """
    ticks = max(len(trace.counts) for trace in traces)
    if asked:
        if asked[0] >= ticks:
            raise ValueError(f"--ticks {asked[0]}:{asked[1]}: the trace has {ticks:,} ticks, from 0 on")
        return asked[0], min(asked[1], ticks)
    events = sum(int((lane.durations >= SHORTEST).sum()) for trace in traces for lane in lanes(trace).values())
    if events <= MOST_EVENTS:
        return 0, ticks
    room = max(1, ticks * MOST_EVENTS // events)
    return (ticks - room) // 2, (ticks + room) // 2


def write(traces: Sequence[RankTrace], ticks: tuple[int, int], file: Path) -> None:
    with gzip.open(file, "wt", compresslevel=4) as opened:
        opened.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for trace in traces:
            for event in _events(trace, ticks):
                opened.write(json.dumps(event) + ",\n")
        opened.write('{"ph": "M", "name": "end", "pid": 0}\n]}\n')


def lanes(trace: RankTrace) -> dict[str, Lane]:
    return {"host": trace.host} | ({"device": trace.device} if trace.device else {})


def spans(lane: Lane, ticks: tuple[int, int]) -> tuple[Ints, Ints, Ints, Ints]:
    """Of ticks [a, b): begins, durations, places of phases, ticks, of all spans that are no shorter than SHORTEST."""
    first, last = ticks
    durations = lane.durations[first:last]
    begins = lane.starts[first:last, None] + np.cumsum(durations, 1) - durations
    at, phases = np.nonzero(durations >= SHORTEST)
    return begins[at, phases], durations[at, phases], phases, at + first


def _events(trace: RankTrace, ticks: tuple[int, int]) -> Iterator[dict[str, Any]]:
    rank = trace.rank
    yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": trace.name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for track, (name, lane) in enumerate(lanes(trace).items()):
        yield {"ph": "M", "name": "thread_name", "pid": rank, "tid": track, "args": {"name": name}}
        yield from _spans(trace, track, name, lane, ticks)
    if trace.is_leader:
        yield from _counters(trace, ticks)


def _spans(trace: RankTrace, track: int, name: str, lane: Lane, ticks: tuple[int, int]) -> Iterator[dict[str, Any]]:
    names = [phase.name.lower() for phase in lane.phases]
    if name == "device":
        names[lane.phases.index(Phase.REPORT)] = GAP
    for begin, duration, phase, tick in zip(*(each.tolist() for each in spans(lane, ticks)), strict=True):
        event = {"ph": "X", "name": names[phase], "pid": trace.rank, "tid": track}
        event |= {"ts": begin / 1e3, "dur": duration / 1e3, "args": {"tick": tick}}
        if lane.phases[phase] is Phase.FORWARD and tick < len(trace.counts):
            event["args"] |= _about(trace, tick)
        yield event


def _about(trace: RankTrace, tick: int) -> dict[str, int]:
    counts = trace.counts[tick]
    names = ("rows", "padding", "prompt_tokens", "decodes", "samples")
    return {"slot": tick % int(trace.about["slots"])} | {name: int(counts[name]) for name in names}


def _counters(trace: RankTrace, ticks: tuple[int, int]) -> Iterator[dict[str, Any]]:
    for tick in range(*ticks)[: len(trace.counts) - ticks[0]]:
        for name in COUNTERS:
            at = float(trace.host.starts[tick]) / 1e3
            yield {"ph": "C", "name": name, "pid": trace.rank, "ts": at, "args": {name: int(trace.counts[name][tick])}}
