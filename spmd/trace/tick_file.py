"""The files of a trace, one a rank for what its loop did, on GPUs another one for what its device did.

    <run dir>/trace/rank-<n>.bin          a record of TICK_FIELDS for each tick, then one for what came after the last
    <run dir>/trace/rank-<n>.device.bin   a record of TURN_FIELDS for each turn of the stage

A file begins with one line of JSON that says whose it is and lists the fields of its records, each with the letter that
`struct` gives its type. The records follow, packed without gaps, in little-endian order: 120 bytes a tick (a million
ticks: 120 MB) and 40 bytes a turn. Durations and times are in units of UNIT nanoseconds. Times are on the rank's
perf_counter; `offset_ns` in the header takes them to rank 0's. A duration of more than seven minutes is cut to that.

Records are collected in memory and written SPILL at a time, so that a tick costs no system call and a run that is
killed leaves all but its last records. What a cut-off write has left of a last record is passed over.
"""

import json
import logging
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spmd.topology import Topology
from spmd.trace.phases import Phase

log = logging.getLogger("spmd")

FORMAT = 1
UNIT = 100  # nanoseconds
SPILL = 256  # records
MOST = 2**32 - 1  # units of a duration

Fields = Sequence[tuple[str, str]]


def of(phase: Phase) -> str:
    """The field of a phase's duration."""
    return f"{phase.name.lower()}_time"


COUNTS = (
    "tick",
    "rows",  # of the forward, with padding; 0: none was run
    "padding",  # rows of these
    "prompt_tokens",
    "decodes",
    "samples",  # rows that got a token
    "running",  # requests
    "waiting",
    "free_blocks",
    "tokens",  # committed
)
TICK_FIELDS: Fields = [("start", "q"), *((of(phase), "I") for phase in Phase), *((name, "I") for name in COUNTS)]
TURN_PHASES = (Phase.REPORT, Phase.FEEDBACK, Phase.INPUTS, Phase.HIDDEN, Phase.FORWARD, Phase.SAMPLE, Phase.SEND)
TURN_FIELDS: Fields = [
    ("issued", "q"),  # when the host began to give the device this turn's work
    ("anchored", "I"),  # 1: the device had nothing to do by then, so the turn began at that time
    *((of(phase), "I") for phase in TURN_PHASES),  # that of REPORT: the gap between the last turn and this one
]


def place(topology: Topology) -> dict[str, int]:
    """What a header says of a rank's place."""
    names = ("rank", "dp", "pp", "tp", "dp_rank", "pp_rank", "tp_rank")
    return {name: getattr(topology, name) for name in names}


class RecordFile:
    """A file of records that is being written, by the loop's thread alone.

    A file that can't be written any more, as on a full disk, ends there with a warning in the log: no trace is worth a
    run.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], fields: Fields) -> None:
        """Raises: OSError: the file can't be made."""
        self.path = path
        self.layout = layout(fields)
        self.buffer = bytearray(SPILL * self.layout.size)
        self.used = 0  # bytes
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115
        self.file.write(json.dumps({"format": FORMAT, "unit_ns": UNIT, **about, "fields": fields}).encode() + b"\n")

    def write(self, *values: int) -> None:
        """Values of all fields, times and durations in units."""
        self.layout.pack_into(self.buffer, self.used, *values)
        self.used += self.layout.size
        if self.used == len(self.buffer):
            self.spill()

    def spill(self) -> None:
        try:
            if not self.file.closed:
                self.file.write(memoryview(self.buffer)[: self.used])
        except OSError as error:
            log.warning("the trace ends here: %s can't be written: %s", self.path, error.strerror)
            self.file.close()
        self.used = 0

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.spill()
        self.file.close()


def layout(fields: Fields) -> struct.Struct:
    return struct.Struct("<" + "".join(letter for _, letter in fields))
