"""The stage's clock, on the CPU and on a GPU."""

import time

import pytest
import torch

from spmd.report.clock import StageClock


def test_blocks_add_up_and_the_time_between_does_not() -> None:
    clock, started = StageClock(torch.device("cpu")), time.perf_counter()
    assert clock.total() == 0
    for _ in range(3):
        time.sleep(0.05)
        with clock.busy():
            time.sleep(0.02)
    assert 0.06 <= clock.total() <= time.perf_counter() - started - 0.15
    assert clock.total() == clock.total()


def test_a_block_that_raises_is_not_counted() -> None:
    clock = StageClock(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), clock.busy():
        raise ZeroDivisionError
    assert clock.total() == 0
    with clock.busy():
        pass
    assert clock.total() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_timed_without_waiting_for_it() -> None:
    device = torch.device("cuda")
    clock, other = StageClock(device), torch.cuda.Stream()
    x = torch.randn(8192, 8192, device=device)
    (x @ x).sum().item()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
    for begin, end in marks:
        with torch.cuda.stream(other):
            x @ x  # what the stage waits for before its block
        torch.cuda.current_stream().wait_stream(other)
        begin.record()
        with clock.busy():
            for _ in range(3):
                x @ x
        end.record()
    assert not marks[-1][1].query(), "the host was not held up"
    assert clock.seconds < clock.total()
    assert clock.total() == pytest.approx(sum(begin.elapsed_time(end) for begin, end in marks) / 1e3, rel=0.02)
    assert not clock.pending
    events = len(clock.free)
    with clock.busy():
        pass
    assert len(clock.free) == events - 1, "events are used again"
