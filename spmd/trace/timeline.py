"""The trace of a run as its files have it: what every rank did when, on one clock.

All times are int64 nanoseconds since the first tick of any rank.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spmd.trace.phases import Phase
from spmd.trace.tick_file import FORMAT, TURN_PHASES, UNIT, of

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass
class Lane:
    """What one rank's host or device did: in each of T turns, phases that follow one another without a gap."""

    phases: tuple[Phase, ...]  # P of them, in order
    starts: Ints  # [T]
    durations: Ints  # [T, P]
    anchored: Bools  # [T]; of a device, whether it had nothing to do when the host began to give it the turn's work

    @property
    def ends(self) -> Ints:
        """[T]"""
        ends: Ints = self.starts + self.durations.sum(1)
        return ends

    def shift(self, ns: int) -> None:
        self.starts = self.starts + ns


@dataclass
class RankTrace:
    """One rank's."""

    about: dict[str, Any]  # the header
    counts: Any  # structured array [T] with the fields of a tick
    host: Lane
    device: Lane | None  # None: the host's is the device's, on a CPU

    @property
    def rank(self) -> int:
        return int(self.about["rank"])

    @property
    def name(self) -> str:
        a = self.about
        return f"rank {a['rank']} dp{a['dp_rank']}/pp{a['pp_rank']}/tp{a['tp_rank']}"

    @property
    def is_leader(self) -> bool:
        return bool(self.about["pp_rank"] == self.about["pp"] - 1 and self.about["tp_rank"] == 0)

    @property
    def lane(self) -> Lane:
        """Of what computes."""
        return self.device or self.host


def read(folder: Path) -> list[RankTrace]:
    """The traces of all ranks, by rank; of a run that is going on or was killed, as far as they were written.

    Raises:
        ValueError: there is no trace, or a file isn't one.
    """
    files = [file for file in folder.glob("rank-*.bin") if not file.name.endswith(".device.bin")]
    traces = sorted((_read_rank(file) for file in files), key=lambda trace: trace.rank)
    traces = [trace for trace in traces if len(trace.counts)]
    if not traces:
        raise ValueError(f"there is no trace of a tick in {folder}; a run with trace=true leaves one in its run_dir")
    first = min(int(trace.host.starts[0]) for trace in traces)
    for trace in traces:
        for lane in (trace.host, trace.device):
            if lane:
                lane.shift(-first)
    return traces


def _read_rank(file: Path) -> RankTrace:
    about, ticks = _records(file)
    starts = ticks["start"].astype(np.int64) * UNIT + about["offset_ns"]
    host = Lane(tuple(Phase), starts, _durations(ticks, tuple(Phase)), np.ones(len(ticks), dtype=np.bool_))
    device = None
    if (of_device := file.with_suffix(".device.bin")).exists():
        _, turns = _records(of_device)
        device = _device_lane(turns)
        device.shift(about["offset_ns"])
    return RankTrace(about, ticks, host, device)


def _records(file: Path) -> tuple[dict[str, Any], Any]:
    """The header, and the whole records behind it."""
    with open(file, "rb") as opened:
        first, content = opened.readline(), opened.read()
    try:
        about = json.loads(first)
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']}, not {FORMAT}: this version of spmd can't read it")
        dtype = np.dtype([(name, {"q": "<i8", "I": "<u4"}[letter]) for name, letter in about["fields"]])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a trace: {error}") from error
    return about, np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype)


def _durations(records: Any, phases: tuple[Phase, ...]) -> Ints:
    durations: Ints = np.stack([records[of(phase)] for phase in phases], 1).astype(np.int64) * UNIT
    return durations


def _device_lane(turns: Any) -> Lane:
    """When a device did what; its durations are measured on its own clock.

    From one turn that is anchored in the host's time to the next one the device's own clock counts. What the two
    clocks have drifted apart by then is spread over the turns between.
    """
    durations = _durations(turns, TURN_PHASES)
    own = np.cumsum(durations.sum(1)) - durations[:, 1:].sum(1)  # where each gap ends, on the device's clock
    anchors = np.flatnonzero(turns["anchored"])
    issued = turns["issued"].astype(np.int64) * UNIT
    base = issued[anchors[0]] - own[anchors[0]] if len(anchors) else 0
    apart = np.interp(own, own[anchors], issued[anchors] - own[anchors] - base) if len(anchors) else 0.0
    ends = own + base + np.asarray(apart).astype(np.int64)
    return Lane(TURN_PHASES, ends - durations[:, 0], durations, turns["anchored"].astype(np.bool_))
