"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP: the polite ways to end a run, and how they reach the loop.

A rank that waits in a collective runs no Python, so a thread reads the signals. Until the loop has begun one ends the
rank at once; then the first one only asks to stop, which the leaders pass on so that all ranks do so at the same tick,
and a second one ends the rank at once.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

FAILED, USAGE = 1, 2  # exit statuses: something broke; something the user can mend
STOPPED = 75  # exit status: stopped early, start again to go on (EX_TEMPFAIL of sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ONE_KEYPRESS = 1.0  # seconds in which a second signal is the same one: Ctrl-C reaches a rank and, by torchrun, again


class Stop:
    """Whether this rank was asked to stop, and whether the run did.

    `asked` is written by the thread that reads the signals and, on leaders, by the guard, which passes on what other
    ranks were asked; it goes from 0 to a code once. The loop reads it. All else the loop's thread writes.
    """

    def __init__(self) -> None:
        self.gently = False  # whether a loop is there to see `asked`
        self.asked = 0  # `code` of who asked; 0: nobody
        self.stopped = 0  # for whom all ranks have stopped; 0: they haven't

    @contextmanager
    def gentle(self) -> Iterator[None]:
        """A loop runs inside that looks at `asked`."""
        self.gently = True
        try:
            yield
        finally:
            self.gently = False


def code(rank: int, number: int) -> int:
    """A positive number that says which signal reached which rank."""
    return rank << 6 | number


def name(asked: int) -> str:
    """What a code says, for people."""
    return f"{signal.Signals(asked & 63).name} on rank {asked >> 6}"


@contextmanager
def listening(rank: int) -> Iterator[Stop]:
    """Catch the signals; to be called in the main thread. Leaves them as they were."""
    stop = Stop()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    heard = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in heard}  # nohup goes on
    wakeup = signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=_read, args=(reader, stop, rank), name="signals", daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def report(status: int) -> None:
    """Leave the exit status of the run where a launcher looks for it: torchrun and srun make another one of it."""
    if file := os.environ.get("SPMD_STATUS"):
        with suppress(OSError), open(file, "w") as out:  # a full disk is reported elsewhere
            out.write(f"{status}\n")


def _read(reader: int, stop: Stop, rank: int) -> None:
    first = 0.0
    while numbers := os.read(reader, 1):
        now = time.monotonic()
        if numbers[0] not in SIGNALS:
            continue
        if not stop.gently or (first and now - first > ONE_KEYPRESS):
            os._exit(STOPPED)  # unreported: torchrun sends SIGTERM also when another rank has crashed
        if not first:
            first, stop.asked = now, stop.asked or code(rank, numbers[0])
