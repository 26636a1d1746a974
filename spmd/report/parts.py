"""Where each rank's time went, over the time of the run, from its trace: the account of a run, cut into bins.

Parts are those of `spmd.trace.account`, by the same rules. The cut is drawn with what shares a turn in the order of its
phases; of a forward, useful rows come first, then padding; of a gap, the parts come in the order of GAP.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spmd.trace.account import PARTS
from spmd.trace.phases import Phase
from spmd.trace.timeline import Ints, Lane, RankTrace

NAMES = tuple(PARTS)
TAIL = NAMES.index("idle_tail")
COMPUTING = [NAMES.index(part) for part in ("forward", "sample", "padding", "dummy")]
FORWARD = ("forward", "padding", "dummy")
GAP = ("token_wait", "row_wait", "exchange", "host")  # what a device that has nothing to do may be waiting for
OF_PHASE = {phase: NAMES.index(part) for part, phases in PARTS.items() for phase in phases}

Floats = NDArray[np.float64]


@dataclass
class Cut:
    """Segments of one rank's time, which follow one another without a gap."""

    bounds: Ints  # [N + 1], nanoseconds
    parts: Ints  # [N], of NAMES

    def seconds(self, edges: Floats) -> Floats:
        """How much of each part lies between neighbouring edges (nanoseconds, ascending): [edges - 1, parts]."""
        lengths = np.diff(self.bounds)
        columns = []
        for part in range(len(NAMES)):
            spent = np.concatenate([[0], np.cumsum(np.where(self.parts == part, lengths, 0))])
            columns.append(np.diff(np.interp(edges, self.bounds, spent)) / 1e9)
        return np.stack(columns, 1)

    def total(self) -> Floats:
        """Seconds of each part."""
        return np.bincount(self.parts, np.diff(self.bounds), len(NAMES)) / 1e9


def cut(trace: RankTrace, end: int) -> Cut:
    """All of a rank's time until `end`, when the run was over, in nanoseconds."""
    host = _split_forward(trace.host, trace, _of_host(trace.host))
    whole = _bounded(trace.host, *host)
    if trace.device:
        whole = _bounded(trace.device, *_of_device(trace.device, trace, whole))
    last = _last_token(trace)
    tail = (whole.bounds[:-1] >= last) & ~np.isin(whole.parts, COMPUTING)
    whole.parts = np.where(tail, TAIL, whole.parts)
    if whole.bounds[-1] < end:
        whole = Cut(np.append(whole.bounds, end), np.append(whole.parts, TAIL))
    return whole


def _of_host(lane: Lane) -> list[int]:
    return [OF_PHASE.get(phase, -1) for phase in lane.phases]


def _split_forward(lane: Lane, trace: RankTrace, parts: list[int]) -> tuple[Ints, list[int]]:
    """Durations [T, P + 2] and the part of each column: that of FORWARD becomes three."""
    place = lane.phases.index(Phase.FORWARD)
    forward = lane.durations[:, place]
    rows, padding = (_of_turns(trace.counts[name].astype(np.int64), len(forward)) for name in ("rows", "padding"))
    padded = forward * padding // np.maximum(rows, 1)
    dummy = np.where((rows > 0) & (padding == rows), forward, 0)
    padded = np.where(dummy > 0, 0, padded)
    split = np.stack([forward - padded - dummy, padded, dummy], 1)
    durations = np.concatenate([lane.durations[:, :place], split, lane.durations[:, place + 1 :]], 1)
    return durations, [*parts[:place], *(NAMES.index(part) for part in FORWARD), *parts[place + 1 :]]


def _of_device(lane: Lane, trace: RankTrace, host: Cut) -> tuple[Ints, list[int]]:
    """The gap at the beginning of a turn becomes the parts of what the host did meanwhile, if it was waited for."""
    durations, parts = _split_forward(lane, trace, [OF_PHASE.get(phase, -1) for phase in lane.phases])
    begins, gaps = lane.starts, durations[:, 0]
    edges = np.stack([begins, begins + gaps], 1).reshape(-1).astype(np.float64)
    meanwhile = host.seconds(np.maximum.accumulate(edges))[::2]
    shares = np.stack([meanwhile[:, NAMES.index(part)] for part in GAP], 1)
    shares[:, -1] += 1e-12  # whatever is not one of these is the host's
    split = (gaps[:, None] * shares / shares.sum(1, keepdims=True)).astype(np.int64)
    split[:, -1] += gaps - split.sum(1)
    split = np.where(lane.anchored[:, None], split, 0)
    split[:, -1] += gaps - split.sum(1)
    return np.concatenate([split, durations[:, 1:]], 1), [*(NAMES.index(part) for part in GAP), *parts[1:]]


def _bounded(lane: Lane, durations: Ints, parts: list[int]) -> Cut:
    begins = lane.starts[:, None] + np.cumsum(durations, 1) - durations
    kept = durations.reshape(-1) > 0
    bounds = np.maximum.accumulate(np.append(begins.reshape(-1)[kept], lane.ends[-1]))
    return Cut(bounds, np.tile(np.array(parts), len(durations))[kept])


def _of_turns(counts: Ints, turns: int) -> Ints:
    """Counts of ticks for as many turns of a device, of which the last ones may be missing or too many."""
    return np.pad(counts, (0, max(0, turns - len(counts))))[:turns]


def _last_token(trace: RankTrace) -> int:
    """When the last tokens were committed."""
    ticks = np.flatnonzero(trace.counts["tokens"])
    if not len(ticks):
        return 0
    phases = list(trace.host.phases)
    until = phases.index(Phase.COMMIT) + 1
    return int(trace.host.starts[ticks[-1]] + trace.host.durations[ticks[-1], :until].sum())
