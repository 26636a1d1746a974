"""Writes a record of every tick of one rank: an engine's watch, and a device clock's listener."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from spmd.schedule.plan import Plan
from spmd.schedule.scheduler import Scheduler
from spmd.trace.device_clock import DeviceClock, Turn, untold
from spmd.trace.host_clock import Clock
from spmd.trace.phases import NUM_PHASES
from spmd.trace.tick_file import MOST, TICK_FIELDS, TURN_FIELDS, TURN_PHASES, UNIT, RecordFile


class Ticking(Protocol):
    """What a record takes from an engine."""

    @property
    def ring(self) -> Sequence[Plan]: ...

    @property
    def scheduler(self) -> Scheduler: ...


class Recorder:
    """Called after each tick. The first record begins where `clock` was started, each other one where the last ended.

    So a tick's record has the time between two ticks at its beginning, and no time is left out.
    """

    def __init__(self, file: RecordFile, clock: Clock) -> None:
        self.file = file
        self.clock = clock
        self.scheduler: Scheduler | None = None
        self._ns = [0] * NUM_PHASES  # up to the last record, like the other counts
        self._rows = self._useful = self._tokens = self._ticks = 0
        self._start = 0  # of the next record, nanoseconds; 0: none was written yet

    def __call__(self, engine: Ticking) -> None:
        plan, self.scheduler = engine.ring[-1], engine.scheduler
        self._write(plan.tick, plan.num_prompt_tokens, plan.num_decodes, len(plan.sampled))
        self._ticks = plan.tick + 1

    def finish(self) -> None:
        """The clock is stopped: one more record, of what was committed and waited for after the last tick."""
        if self.scheduler:
            self._write(self._ticks, 0, 0, 0)

    def _write(self, tick: int, prompt_tokens: int, decodes: int, samples: int) -> None:
        scheduler, clock = self.scheduler, self.clock
        assert scheduler is not None
        host = clock.host
        self._start = self._start or host.since - sum(host.ledger.ns)
        ns, tokens = host.ledger.ns.copy(), scheduler.counters.output_tokens
        spent = [(now - before) // UNIT for before, now in zip(self._ns, ns, strict=True)]
        if max(spent) > MOST:
            spent = [min(units, MOST) for units in spent]
        rows, useful = clock.rows - self._rows, clock.useful - self._useful
        self.file.write(
            self._start // UNIT,
            *spent,
            *(tick, rows, rows - useful, prompt_tokens, decodes, samples),
            *(scheduler.num_running, scheduler.num_waiting, scheduler.pool.num_free, tokens - self._tokens),
        )
        self._start = host.since
        self._ns, self._rows, self._useful, self._tokens = ns, clock.rows, clock.useful, tokens


class TurnRecorder:
    """A DeviceClock tells it of each turn."""

    def __init__(self, file: RecordFile) -> None:
        self.file = file

    def __call__(self, turn: Turn, ns: Sequence[int]) -> None:
        spent = (min(ns[phase] // UNIT, MOST) for phase in TURN_PHASES)
        self.file.write(turn.issued_ns // UNIT, int(turn.idle is not None), *spent)


@contextmanager
def recording(folder: Path, clock: Clock, about: Mapping[str, Any]) -> Iterator[Recorder]:
    """What to call after each tick of a run; it leaves the files of one rank in `folder`.

    Args:
        about: what headers say; `rank` names the files.

    Raises:
        OSError: they can't be made.
    """
    name = f"rank-{about['rank']}"
    with ExitStack() as files:
        recorder = Recorder(files.enter_context(RecordFile(folder / f"{name}.bin", about, TICK_FIELDS)), clock)
        if isinstance(clock, DeviceClock):
            of_device = files.enter_context(RecordFile(folder / f"{name}.device.bin", about, TURN_FIELDS))
            clock.told = TurnRecorder(of_device)
            files.callback(setattr, clock, "told", untold)
        yield recorder
        recorder.finish()
