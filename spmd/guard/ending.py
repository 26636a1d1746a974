"""How a rank ends when the run can't go on: it says why, leaves its stacks, takes lost ranks along, and exits.

What the user can mend is a Mistake: one line, exit status 2. Anything else that comes out of the loop is a crash, and a
ValueError of another kind too: a traceback, one line, status 1.
"""

import faulthandler
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from spmd.messages import Mistake, first_line
from spmd.schedule.digests import Diverged
from spmd.signals import FAILED, USAGE, report
from spmd.topology import Topology

log = logging.getLogger("spmd")


class Place(NamedTuple):
    """Where a rank runs."""

    text: str  # role, host and process, for people
    machine: str  # equal for ranks that can see each other's processes
    pid: int
    recorder: int  # descriptor, in that process, of its flight recorder


class End(NamedTuple):
    """Why the run ends, as the rank that found out tells all others."""

    message: str
    status: int  # exit status of every rank
    lost: Sequence[int]  # ranks that give no sign of life: those on their machine kill them
    teller: int  # the rank that prints the message; the others only write it to their logs


def this_place(topology: Topology, recorder: int) -> Place:
    """Of this rank, with the descriptor of its recorder."""
    pid = os.getpid()
    return Place(f"{topology}, {socket.gethostname()}, pid {pid}", this_machine(), pid, recorder)


def own_failure(error: BaseException, rank: int, places: Sequence[Place]) -> End:
    """What there is to say of an error of this rank's loop; a crash prints its traceback here, at once."""
    who = f"rank {rank} ({places[rank].text})"
    if isinstance(error, Mistake):
        return End(f"{error} [{who}]", USAGE, (), rank)
    sys.stderr.write("".join(traceback.format_exception(error)))
    return End(f"{who} failed: {type(error).__name__}: {first_line(error)}", FAILED, (), rank)


@contextmanager
def after_start_up() -> Iterator[None]:
    """Only a Mistake is the user's, once the work has begun.

    Raises:
        RuntimeError: in the place of a ValueError that is none. During start-up these are nearly always the user's.
    """
    try:
        yield
    except Mistake:
        raise
    except ValueError as error:
        raise RuntimeError(f"{type(error).__name__}: {first_line(error)}") from error


def is_symptom(error: BaseException) -> bool:
    """Whether something else is the cause: a peer that is gone, or one that differs."""
    lost = isinstance(error, RuntimeError) and "gloo" in str(error)
    return lost or isinstance(error, (Diverged, dist.DistError))


def end_rank(end: End, rank: int, places: Sequence[Place], logs: Path, linger: float) -> NoReturn:
    """Print or log the message, leave stacks in the log, kill lost ranks of this machine, and exit after `linger` s."""
    if end.teller == rank:
        sys.stderr.write(f"error: {end.message}\n")  # at one go, as several ranks may tell at once; print() isn't
        report(end.status)
    log.error(end.message)
    with suppress(OSError), open(logs / f"rank-{rank}.log", "a") as file:
        faulthandler.dump_traceback(file, all_threads=True)
    with suppress(OSError, RuntimeError):
        for place in (places[lost] for lost in end.lost):
            if place.machine == this_machine() and place.pid != os.getpid():
                os.kill(place.pid, signal.SIGKILL)
    time.sleep(linger)
    os._exit(end.status)  # the loop may wait in a collective for ever, so there is no other way out


def this_machine() -> str:
    """What ranks that can see each other's processes have in common: one boot of one kernel, one namespace of pids."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
