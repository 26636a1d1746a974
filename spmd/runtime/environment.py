"""What a start finds around it: this rank's place, and what would make it wait or fail later. Imports no torch."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from spmd.messages import Mistake, first_line, listed

DEBUG = "TORCH_DISTRIBUTED_DEBUG"
DEBUG_LEVELS = ("OFF", "INFO", "DETAIL")
INTERFACES = "GLOO_SOCKET_IFNAME"
LEFT_OVER = "WORLD_SIZE, RANK and MASTER_ADDR are set, but not by torchrun or srun: unset them if they are left over"
LOOKS = 5  # for a host's name, a second apart: a cluster's name server may be slow when a job begins
LAUNCHED, ALONE = 60.0, 5.0  # seconds between lines that say who is waited for, by whether a launcher started the rank


@dataclass(frozen=True)
class Place:
    """This rank among all, as torchrun or srun has set it, or as it was left over in somebody's shell."""

    rank: int
    world_size: int
    address: str  # where ranks meet; empty: nowhere
    port: str
    launched: bool  # by torchrun or as a task of srun, which have really started so many
    speaks: bool  # for its machine, before rank 0 can be heard

    @property
    def joins(self) -> bool:
        return self.world_size > 1 and bool(self.address)


def place(environ: Mapping[str, str]) -> Place:
    """Read where this rank belongs.

    Raises:
        Mistake: the variables can't all be true.
    """
    rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    if rank >= world_size:
        raise Mistake(
            f"RANK={rank} with WORLD_SIZE={environ.get('WORLD_SIZE', 'unset')}: ranks count from 0, so there is no "
            f"such rank; unset RANK, WORLD_SIZE and MASTER_ADDR if no launcher has set them"
        )
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if world_size > 1 and address and not (port.isdecimal() and int(port) < 2**16):
        raise Mistake(f"MASTER_PORT={port or 'unset'} is not a port, with MASTER_ADDR={address} and {world_size} ranks")
    launched = "TORCHELASTIC_RUN_ID" in environ or environ.get("RANK") == environ.get("SLURM_PROCID", "none")
    return Place(rank, world_size, address, port, launched, environ.get("LOCAL_RANK", "0") == "0")


def check_environment(environ: Mapping[str, str]) -> None:
    """Check what concerns every start, and the launchers before it.

    Raises:
        Mistake: names the variable, or that the working directory is gone.
    """
    if (level := environ.get(DEBUG, "")).upper() not in ("", *DEBUG_LEVELS):
        raise Mistake(f"{DEBUG}={level} is not one of {', '.join(DEBUG_LEVELS)}, and torch refuses it")
    try:
        os.getcwd()
    except OSError as error:
        raise Mistake(f"the working directory is gone ({error.strerror}): go to one that is there") from error


def check_interfaces(environ: Mapping[str, str]) -> None:
    """Check that this machine has the network interfaces that gloo is told to use, one or several with commas.

    Raises:
        Mistake: it has none of that name.
    """
    here = [name for _, name in socket.if_nameindex()]
    for name in environ.get(INTERFACES, "").split(","):
        if name and name not in here:
            raise Mistake(
                f"{INTERFACES}={environ[INTERFACES]}: this machine has no network interface {name!r}, it has "
                f"{listed(here, 8)}; set one of these, or unset the variable"
            )


def environment_warnings(environ: Mapping[str, str]) -> list[str]:
    """What is set but not followed."""
    if environ.get(DEBUG, "").upper() != "DETAIL":
        return []
    return [
        f"{DEBUG}=DETAIL is taken as INFO: it has all ranks of a group wait for each other at every collective, "
        f"which stages that are at different ticks can't"
    ]


def resolve_host(place: Place) -> None:
    """Return once the name of the host where ranks meet can be resolved; torch would try for as long as it may wait.

    Raises:
        OSError: it can't.
    """
    for look in range(LOOKS):
        try:
            socket.getaddrinfo(place.address, int(place.port))
            return
        except OSError:
            if look == LOOKS - 1:
                raise
        time.sleep(1)


@contextmanager
def waiting(place: Place) -> Iterator[None]:
    """Says now and then, while what runs inside waits for other ranks, for whom and where."""
    done = threading.Event()
    thread = threading.Thread(target=_tell, args=(place, done), name="waiting", daemon=True)
    if place.speaks:
        thread.start()
    try:
        yield
    finally:
        done.set()


def _tell(place: Place, done: threading.Event) -> None:
    every, started = LAUNCHED if place.launched else ALONE, time.monotonic()
    while not done.wait(every):
        by = "" if place.launched else f"; {LEFT_OVER}"
        sys.stderr.write(
            f"rank {place.rank} has waited {time.monotonic() - started:.0f} s to meet the other "
            f"{place.world_size - 1} of {place.world_size} ranks at {place.address}:{place.port}{by}\n"
        )
        every = LAUNCHED


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise Mistake(f"{name}={text!r} in the environment is not a number, 0 or more; unset it if no launcher set it")
    return int(text)


def cannot_meet(place: Place, error: BaseException) -> str:
    """That a rank can't meet the others and why, as one line."""
    return f"rank {place.rank} can't meet the others at {place.address}:{place.port}: {first_line(error)}"
