"""A look inside a few ticks: torch's profiler, switched on and off between ticks, on every rank at the same ones."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from spmd.config import ProfileConfig

log = logging.getLogger("spmd")
Watch = Callable[[Any], None]  # an Engine, which stands above this package


def all_of(*watches: Watch | None) -> Watch | None:
    """One that calls those given, in order; None if there are none, so that a tick pays nothing."""
    present = [watch for watch in watches if watch]
    if len(present) < 2:
        return present[0] if present else None

    def watch(engine: Any) -> None:
        for each in present:
            each(engine)

    return watch


class Profiler:
    """Records from before tick `first` until before tick `end`; `close` writes `file`, a Chrome trace.

    Called after every tick. That ticks of a rank bear the same number on every other makes their traces comparable.
    On a GPU its kernels are recorded, else PyTorch's operators. Recording these only pauses at `end`: messages that are
    still on their way then write to the record when they arrive, so it is kept until `close`, when all have.
    """

    def __init__(self, first: int, end: int, file: Path) -> None:
        self.first = first
        self.end = end
        self.file = file
        self.tick = 0  # that comes next
        self.activity = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
        with profile(activities=[self.activity]):
            pass  # the first of a process takes a second
        self.profile = profile(activities=[self.activity])
        self.running = False
        self._turn()

    def __call__(self, engine: Any) -> None:
        self.tick += 1
        self._turn()

    def close(self) -> None:
        """Write what was recorded; the run is over and nothing on its way."""
        if self.running:
            self.profile.stop()
        if self.tick >= self.first:
            self.profile.export_chrome_trace(str(self.file))

    def _turn(self) -> None:
        if self.tick == self.first:
            self.profile.start()
            self.running = True
        elif self.tick == self.end and self.activity == ProfilerActivity.CPU:
            self.profile.toggle_collection_dynamic(False, [self.activity])
        elif self.tick == self.end:
            torch.cuda.synchronize()  # a kernel is recorded when it has run
            self.profile.stop()
            self.running = False


@contextmanager
def profiled(config: ProfileConfig, run_dir: Path, rank: int) -> Iterator[Watch | None]:
    """A watch for one run that leaves `profile/trace-rank-<rank>.json.gz` in `run_dir`; None if nothing is asked for.

    A run that fails leaves no trace.
    """
    if config.ticks is None:
        yield None
        return
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    first, end = config.ticks
    profiler = Profiler(first, end, folder / f"trace-rank-{rank}.json.gz")
    yield profiler
    profiler.close()
    if profiler.tick <= profiler.first:
        log.warning("profile.ticks=%s: nothing recorded, the run had %d ticks", config.ticks, profiler.tick)
