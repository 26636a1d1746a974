"""A look inside a few ticks: torch's profiler, switched on and off between ticks, on every rank at the same ones."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from spmd.config import ProfileConfig

log = logging.getLogger("spmd")


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

    def __call__(self, engine: object) -> None:
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
def profiled(config: ProfileConfig, run_dir: Path, rank: int) -> Iterator[Callable[[object], None]]:
    """What to call after each tick of a run; it leaves `profile/trace-rank-<rank>.json.gz` in `run_dir`, if asked for.

    A run that fails leaves no trace.
    """
    if config.ticks is None:
        yield lambda engine: None
        return
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    first, end = config.ticks
    profiler = Profiler(first, end, folder / f"trace-rank-{rank}.json.gz")
    yield profiler
    profiler.close()
    if profiler.tick <= profiler.first:
        log.warning("profile.ticks=%s: nothing recorded, the run had %d ticks", config.ticks, profiler.tick)
