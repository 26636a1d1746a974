"""Traces: what is recorded of an engine, how it reaches the disk, and what is read of it."""

import errno
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from spmd.parallel.groups import join
from spmd.trace.alignment import Offset, measure
from spmd.trace.device_clock import DeviceClock
from spmd.trace.host_clock import HostClock
from spmd.trace.phases import Phase
from spmd.trace.recorder import recording
from spmd.trace.tick_file import SPILL, TICK_FIELDS, RecordFile, layout
from spmd.trace.timeline import read
from tests.support.ranks import Ranks
from tests.support.simulation import Simulation, make_request, make_scheduler
from tests.trace.test_device_clock import MS, Device, turn

ABOUT: dict[str, Any] = {"rank": 0, "dp": 1, "pp": 1, "tp": 1, "dp_rank": 0, "pp_rank": 0, "tp_rank": 0}
ABOUT |= {"host": "here", "offset_ns": 0, "offset_error_ns": 0, "slots": 1, "seats": 8, "device": "cpu"}


def record_simulation(folder: Path, **about: Any) -> Simulation:
    """A run of a real engine whose stage computes nothing."""
    simulation = Simulation(make_scheduler()).add([make_request(index) for index in range(3)])
    engine = simulation.engine
    with recording(folder, engine.clock, ABOUT | about) as recorder:
        engine.watch = recorder
        engine.clock.start()
        engine.run()
        engine.clock.stop()
    return simulation


def test_every_tick_is_recorded_without_a_gap(tmp_path: Path) -> None:
    engine = record_simulation(tmp_path).engine
    (trace,) = read(tmp_path)
    ticks = len(trace.counts)
    assert ticks > 5 and trace.counts["tick"].tolist() == list(range(ticks))
    assert trace.host.starts[0] == 0 and (np.diff(trace.host.starts) > 0).all()
    gaps = trace.host.starts[1:] - trace.host.ends[:-1]
    assert (np.abs(gaps) <= 100 * (len(Phase) + 1)).all(), "all but what is rounded to a unit"
    assert trace.host.durations.sum() == pytest.approx(sum(engine.clock.host.ledger.ns), abs=100 * ticks * len(Phase))
    assert trace.counts["tokens"].sum() == engine.scheduler.counters.output_tokens > 0
    assert trace.counts["prompt_tokens"].sum() > 0 and trace.counts["samples"].sum() >= trace.counts["tokens"].sum()
    assert trace.counts["running"].max() == 3 and trace.counts["running"][-1] == 0


def test_ranks_are_laid_on_one_clock(tmp_path: Path) -> None:
    record_simulation(tmp_path)
    record_simulation(tmp_path, rank=1, offset_ns=10**12)
    first, second = read(tmp_path)
    assert first.host.starts[0] == 0 and 10**12 < second.host.starts[0] < 10**12 + 60 * 10**9


def test_records_are_written_some_at_a_time_and_a_killed_run_leaves_them(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "rank-0.bin", ABOUT, TICK_FIELDS)
    fields = len(TICK_FIELDS) - 1
    for tick in range(2 * SPILL + 7):
        file.write(tick * 1000, *([5] * fields))
    written = (tmp_path / "rank-0.bin").stat().st_size
    (trace,) = read(tmp_path)
    assert len(trace.counts) == 2 * SPILL, "the last ones are in memory"
    with file:
        pass
    (trace,) = read(tmp_path)
    assert len(trace.counts) == 2 * SPILL + 7
    with open(tmp_path / "rank-0.bin", "r+b") as torn:
        torn.truncate(written + 3 * layout(TICK_FIELDS).size + 1)
    (trace,) = read(tmp_path)
    assert len(trace.counts) == 2 * SPILL + 3, "what a cut-off write left is passed over"


def test_a_full_disk_ends_the_trace_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(io.RawIOBase):
        def write(self, content: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with RecordFile(tmp_path / "rank-0.bin", ABOUT, TICK_FIELDS) as file:
        file.file.close()
        file.file = Full()  # type: ignore[assignment]
        for _ in range(3 * SPILL):
            file.write(*([0] * len(TICK_FIELDS)))
    assert caplog.text.count("the trace ends here") == 1 and "No space left on device" in caplog.text


def test_durations_that_have_no_room_are_cut(tmp_path: Path) -> None:
    simulation = Simulation(make_scheduler()).add([make_request(0)])
    engine = simulation.engine
    with recording(tmp_path, engine.clock, ABOUT) as recorder:
        engine.clock.start()
        engine.tick(0)
        engine.clock.host.ledger.ns[Phase.ROWS] += 10**15
        recorder(engine)
    (trace,) = read(tmp_path)
    assert trace.host.durations[0, Phase.ROWS] == (2**32 - 1) * 100
    assert 0 < trace.host.durations[0, Phase.SCHEDULE] < 10**9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a trace"),
        (b"PK\x03\x04\xff\n", "is not a trace"),
        (b'{"format": 99}\n', "its format is 99, not 1"),
        (b"[1]\n", "is not a trace"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "rank-0.bin").write_bytes(content)
    with pytest.raises(ValueError, match=said) as refused:
        read(tmp_path)
    assert "rank-0.bin" in str(refused.value) and "\n" not in str(refused.value)


def test_no_trace_at_all_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no trace of a tick in .*trace=true"):
        read(tmp_path)


@pytest.mark.parametrize("drift", [1.0, 1.001])
def test_what_a_device_did_is_laid_on_the_hosts_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drift: float
) -> None:
    """Its own clock may run at another rate: the host's time counts where the device began and ended a run."""
    device = Device(drift)
    for module in ("host_clock", "device_clock"):
        monkeypatch.setattr(f"spmd.trace.{module}.perf_counter_ns", lambda: device.now)
    clock, done, engine = DeviceClock(device.event), [], Simulation(make_scheduler()).engine
    with recording(tmp_path, clock, ABOUT | {"device": "cuda"}) as recorder:
        clock.start()
        for _ in range(40):
            turn(clock, device, hidden=1, forward=4)
            done.append(device.done)
            device.host(1)
            engine.ring.append(engine.scheduler.schedule(0))
            recorder(engine)
        clock.stop()
    (trace,) = read(tmp_path)
    lane = trace.device
    assert lane is not None and trace.lane is lane
    assert lane.phases[0] is Phase.REPORT
    began = 10**12
    ends = lane.ends[: len(done)] - lane.ends[0] + done[0] - began
    assert ends / MS == pytest.approx((np.array(done) - began) / MS, abs=0.02)
    assert (np.diff(lane.starts) > -1000).all(), "but for the rounding to units"
    assert lane.durations.sum() / MS / drift == pytest.approx((device.now - began) / MS, abs=0.1)


def offset_of(rank: int, hosts: list[str]) -> Offset:
    join()
    offset = measure(rank, hosts)
    dist.barrier()  # nobody leaves while others still connect
    return offset


def test_clocks_of_other_hosts_are_asked_for_and_those_of_the_same_one_are_not(ranks: Ranks) -> None:
    """All ranks have one clock here: what is measured is what the measurement may be wrong by, and no more."""
    first, same, *others = ranks.run(4, offset_of, ["a", "a", "b", "c"])
    assert first == same == Offset(0, 0)
    for ns, error_ns in others:
        assert 0 < error_ns < 10**8 and abs(ns) <= error_ns


def test_host_clocks_tell_nobody(tmp_path: Path) -> None:
    with recording(tmp_path, HostClock(), ABOUT):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["rank-0.bin"]
