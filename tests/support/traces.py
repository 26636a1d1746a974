"""Made-up traces: the files that ranks of a pipeline would leave.

python -m tests.support.traces FOLDER [ranks] [ticks]
"""

import random
import sys
from pathlib import Path
from typing import Any

from spmd.topology import Topology
from spmd.trace.phases import Phase
from spmd.trace.tick_file import TICK_FIELDS, TURN_FIELDS, TURN_PHASES, UNIT, RecordFile, place

US = 1000 // UNIT
TICK, FORWARD = 5000 * US, 4000 * US


def make_traces(folder: Path, topology: Topology, ticks: int, device: str = "cpu") -> None:
    """Each tick takes 5 ms; requests run out over the last tenth of the ticks."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(topology.world_size):
        _make_rank(folder, Topology(topology.dp, topology.pp, topology.tp, rank), ticks, device)


def _make_rank(folder: Path, t: Topology, ticks: int, device: str) -> None:
    rng = random.Random(t.rank)
    about = header(t, device)
    with RecordFile(folder / f"rank-{t.rank}.bin", about, TICK_FIELDS) as file:
        now = t.pp_rank * FORWARD
        turns = []
        for tick in range(ticks):
            running = min(64, (ticks - tick) * 640 // ticks)
            spent = {phase: rng.randrange(20 * US) for phase in Phase}
            spent[Phase.FORWARD] = int(FORWARD * rng.uniform(0.8, 1)) if running else 0
            spent[Phase.HIDDEN] = rng.randrange(500 * US) if t.pp_rank else 0
            spent[Phase.PACKET] = TICK - sum(spent.values()) + spent[Phase.PACKET]
            rows = (32, 32 - max(1, running // 2)) if running else (0, 0)
            file.write(now, *spent.values(), tick, *rows, 0, running // 2, running // 2, running, 9, 99, running // 2)
            of_device = [spent[phase] for phase in TURN_PHASES[1:]]
            gap = TICK - sum(of_device)
            turns.append((now + gap, int(tick % 3 == 0), gap, *of_device))
            now += sum(spent.values())
    if device == "cuda":
        with RecordFile(folder / f"rank-{t.rank}.device.bin", about, TURN_FIELDS) as file:
            for turn in turns:
                file.write(*turn)


def header(t: Topology, device: str = "cpu") -> dict[str, Any]:
    return {
        **place(t),
        "host": "here",
        "offset_ns": 0,
        "offset_error_ns": 0,
        "slots": t.pp,
        "seats": 64,
        "device": device,
    }


if __name__ == "__main__":
    _ranks, _ticks = (int(argument) for argument in [*sys.argv[2:], "16", "1000"][:2])
    make_traces(Path(sys.argv[1]), Topology(dp=_ranks // 4, pp=4), _ticks, "cuda")
