"""The clock of a device that the host runs ahead of, by made-up events, and on a GPU."""

import time

import pytest
import torch

from spmd.trace import device_clock
from spmd.trace.account import PARTS
from spmd.trace.device_clock import DeviceClock
from spmd.trace.phases import Phase

MS = 1_000_000


class Device:
    """A device and its host on a virtual clock, in nanoseconds. What the host gives the device is done in order."""

    def __init__(self, drift: float = 1.0) -> None:
        """`drift`: milliseconds that the device counts in each of the host's."""
        self.drift = drift
        self.now = 10**12  # the host's
        self.done = self.now  # when the device will have done all that it was given

    def host(self, ms: float) -> None:
        self.now += int(ms * MS)

    def work(self, ms: float) -> None:
        self.done = max(self.done, self.now) + int(ms * MS)

    def event(self) -> "Passing":
        return Passing(self)


class Passing:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = 0

    def record(self) -> None:
        self.at = self.device.done = max(self.device.done, self.device.now)

    def query(self) -> bool:
        return self.at <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, end_event: object) -> float:
        assert isinstance(end_event, Passing) and self.query() and end_event.query()
        return (end_event.at - self.at) / MS * self.device.drift


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr("spmd.trace.host_clock.perf_counter_ns", lambda: device.now)
    monkeypatch.setattr(device_clock, "perf_counter_ns", lambda: device.now)
    return device


def turn(clock: DeviceClock, device: Device, hidden: float, forward: float, rows: int = 8, useful: int = 8) -> None:
    """What a stage tells, whose host takes a tenth of a millisecond for the inputs."""
    clock.end(Phase.REPORT)
    device.host(0.1)
    clock.end(Phase.INPUTS)
    device.work(hidden)
    clock.end(Phase.HIDDEN)
    device.work(forward)
    clock.ran(rows, useful)
    clock.end(Phase.SEND)


def test_a_device_behind_its_host_is_busy_or_waits_for_hidden_states(device: Device) -> None:
    clock, started = DeviceClock(device.event), device.now
    clock.start()
    for tick in range(10):
        device.host(0.2)
        clock.end(Phase.COMMIT)
        clock.settle()
        turn(clock, device, hidden=1, forward=4, rows=8, useful=6 if tick % 2 else 8)
    clock.settle()
    assert len(clock.pending) > 5, "the host wasn't held up"
    clock.stop()
    account = clock.account((device.now - started) / 1e9)
    seconds = {part: 1e3 * value for part, value in account.seconds.items()}
    assert seconds["hidden_wait"] == pytest.approx(10)
    assert (seconds["forward"], seconds["padding"]) == pytest.approx((35, 5))
    assert seconds["host"] == pytest.approx(0.3), "until the first forward"
    assert 1e3 * account.wall == pytest.approx(50.3)
    assert (clock.rows, clock.useful) == (80, 70)


def test_a_device_ahead_of_its_host_waits_for_what_that_does(device: Device) -> None:
    """Each tick the host waits 3 ms for a packet and 2 for rows, plans for 1, and the device has done all by then."""
    clock, started = DeviceClock(device.event), device.now
    clock.start()
    packets = rows = 0.0
    for _ in range(10):
        device.host(3)
        packets += 3e-3
        clock.end(Phase.COMMIT, packets)
        clock.settle()
        device.host(2)
        rows += 2e-3
        clock.end(Phase.FEED, rows)
        device.host(1)
        clock.end(Phase.SCHEDULE)
        turn(clock, device, hidden=0, forward=1.5)
    device.host(1.5)
    clock.settle()
    clock.stop()
    percent = clock.account((device.now - started) / 1e9).percent()
    seconds = {part: share * (device.now - started) / 1e9 / 100 * 1e3 / 10 for part, share in percent.items()}
    assert seconds["forward"] == pytest.approx(1.5)
    assert seconds["token_wait"] == pytest.approx(3 - 0.9 * 1.5), "the device computes during the first part of it"
    assert seconds["row_wait"] == pytest.approx(2)
    assert seconds["host"] == pytest.approx(1.1)
    assert sum(percent.values()) == pytest.approx(100)


def test_ticks_without_a_forward_and_the_end_are_tail(device: Device) -> None:
    clock, started = DeviceClock(device.event), device.now
    clock.start()
    turn(clock, device, hidden=0, forward=5)
    device.host(5)
    clock.end(Phase.COMMIT)
    clock.end(Phase.REPORT)
    clock.settle()
    for _ in range(20):
        device.host(1)
        clock.end(Phase.LISTEN, 1.0)
        clock.end(Phase.REPORT)
    turn(clock, device, hidden=0, forward=2, useful=0)
    clock.stop()
    account = clock.account((device.now - started) / 1e9)
    assert 1e3 * account.seconds["idle_tail"] == pytest.approx(20.1, abs=0.11)
    assert 1e3 * account.seconds["dummy"] == pytest.approx(2)
    assert account.wall == pytest.approx((device.now - started) / 1e9)


def test_events_are_used_again_and_a_second_run_counts_from_nought(device: Device) -> None:
    made: list[Passing] = []

    def make() -> Passing:
        made.append(device.event())
        return made[-1]

    clock = DeviceClock(make)
    for _ in range(2):
        clock.start()
        started = device.now
        for _ in range(100):
            turn(clock, device, hidden=0, forward=1)
            device.host(1)
        clock.stop()
        assert clock.account((device.now - started) / 1e9).seconds["forward"] == pytest.approx(0.1)
    assert len(made) < 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_timed_without_waiting_for_it() -> None:
    device = torch.device("cuda")
    x = torch.randn(8192, 8192, device=device)
    (x @ x).sum().item()
    clock, other, started = DeviceClock(), torch.cuda.Stream(), time.perf_counter()
    clock.start()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        with torch.cuda.stream(other):
            x @ x  # what the stage waits for
        clock.end(Phase.REPORT)
        torch.cuda.current_stream().wait_stream(other)
        clock.end(Phase.HIDDEN)
        for _ in range(3):
            x @ x
        clock.ran(8, 8)
    end.record()
    assert not end.query(), "the host was not held up"
    clock.settle()
    clock.stop()
    account = clock.account(time.perf_counter() - started)
    assert account.busy + account.seconds["hidden_wait"] == pytest.approx(begin.elapsed_time(end) / 1e3, rel=0.02)
    assert account.seconds["forward"] > 2 * account.seconds["hidden_wait"]
    assert set(account.seconds) == set(PARTS)
