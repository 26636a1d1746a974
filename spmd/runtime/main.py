"""What every main does around its work: find its place, agree with the other ranks, and end with a status.

An error that every rank sees alike is told by rank 0; one that a single rank sees is gathered and told by rank 0 too.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from spmd.config import Config
from spmd.config_checks import check
from spmd.guard.ending import is_symptom
from spmd.messages import first_line
from spmd.parallel.groups import disconnect, join
from spmd.runtime.agreement import ERROR, agree, facts
from spmd.runtime.compose import compose, tell
from spmd.runtime.slurm import adopt_slurm
from spmd.signals import FAILED, STOPPED, USAGE, Stop, listening, report
from spmd.topology import Topology

log = logging.getLogger("spmd")
log.addHandler(logging.NullHandler())  # until there is a run directory; Python would write errors to the terminal
AFTER_ANOTHER = 5.0  # seconds in which torchrun ends a rank whose peer has ended, before it complains of that itself


def main(work: Callable[[Config, Topology, Stop], None]) -> None:
    """Compose the configuration from the command line and run `work` on this rank.

    Exit status: 0 done; 75 stopped by a signal; 2 a ValueError, which rank 0 tells in one line; 1 anything else.
    """
    try:
        adopt_slurm(os.environ)
    except ValueError as error:
        tell(error, int(os.environ.get("SLURM_PROCID", "0")))
        sys.exit(USAGE)
    rank = int(os.environ.get("RANK", "0"))
    with listening(rank) as stop:
        status = _work(work, rank, stop)
        if rank == 0:
            report(status)
    if status:
        sys.exit(status)


def _work(work: Callable[[Config, Topology, Stop], None], rank: int, stop: Stop) -> int:
    try:
        config = _agreed_config(rank)
        t = config.topology
        work(config, Topology(t.dp, t.pp, t.tp, rank), stop)
        disconnect()
        return STOPPED if stop.stopped else 0
    except ValueError as error:
        log.info("ended", exc_info=True)
        tell(error, rank)
        return USAGE
    except Exception as error:
        log.exception("rank %d failed", rank)
        if "RANK" not in os.environ:
            raise
        if is_symptom(error):
            time.sleep(AFTER_ANOTHER)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(FAILED)  # the interpreter's own end would wait for collectives that the other ranks can't finish


def _agreed_config(rank: int) -> Config:
    """The configuration, after joining the world that torchrun started, in which all ranks must have the same one.

    Raises:
        ValueError: on every rank alike, if one of them has another, or one that can't be.
    """
    config, world_size = Config(), int(os.environ.get("WORLD_SIZE", "1"))
    joins = world_size > 1 and "MASTER_ADDR" in os.environ
    try:
        config = compose(quiet=rank != 0)
        check(config, world_size)
        found = facts(config)
    except ValueError as error:
        if not joins:
            raise
        found = {ERROR: str(error)}
    if joins:
        try:
            join(config.guard.startup_timeout)
        except dist.DistError as error:  # no mistake: another attempt has another port, or all nodes
            at = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
            sys.stderr.write(f"error: rank {rank} can't meet the others at {at}: {first_line(error)}\n")
            sys.exit(FAILED)
        agree(found)
    return config
