"""What every main does around its work: find its place, agree with the other ranks, and end with a status.

An error that every rank sees alike is told by rank 0; one that a single rank sees is gathered and told by rank 0 too.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable

from spmd.config import Config
from spmd.config_checks import check
from spmd.guard.ending import is_symptom
from spmd.messages import Mistake
from spmd.parallel.groups import disconnect, join
from spmd.runtime.agreement import ERROR, agree, facts
from spmd.runtime.compose import compose, tell
from spmd.runtime.environment import LEFT_OVER, Place, cannot_meet, check_interfaces, place, resolve_host, waiting
from spmd.runtime.slurm import adopt_slurm
from spmd.runtime.terminal import lasting_output
from spmd.signals import FAILED, STOPPED, USAGE, Stop, listening, report
from spmd.topology import Topology

log = logging.getLogger("spmd")
log.addHandler(logging.NullHandler())  # until there is a run directory; Python would write errors to the terminal
AFTER_ANOTHER = 5.0  # seconds in which torchrun ends a rank whose peer has ended, before it complains of that itself


def main(work: Callable[[Config, Topology, Stop], None]) -> None:
    """Compose the configuration from the command line and run `work` on this rank.

    Exit status: 0 done; 75 stopped by a signal; 2 a ValueError of start-up or a Mistake, which rank 0 tells in one
    line; 1 anything else.
    """
    with lasting_output():
        status = _main(work)
    if status:
        sys.exit(status)


def _main(work: Callable[[Config, Topology, Stop], None]) -> int:
    try:
        adopt_slurm(os.environ)
        at = place(os.environ)
    except ValueError as error:
        tell(error, int(os.environ.get("SLURM_PROCID", "0")))
        return USAGE
    with listening(at.rank) as stop:
        status = _work(work, at, stop)
        if at.rank == 0:
            report(status)
    return status


def _work(work: Callable[[Config, Topology, Stop], None], at: Place, stop: Stop) -> int:
    rank = at.rank
    try:
        config = _agreed_config(at)
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


def _agreed_config(at: Place) -> Config:
    """The configuration, after joining the world that torchrun started, in which all ranks must have the same one.

    Raises:
        ValueError: on every rank alike, if one of them has another, or one that can't be. At once, without the others,
            where no launcher has started any: then there is nobody to tell.
    """
    config = Config()
    try:
        config = compose(quiet=at.rank != 0)
        check(config, at.world_size)
        found = facts(config)
    except ValueError as error:
        if not at.joins:
            raise
        if not at.launched:
            raise Mistake(f"{error}; {LEFT_OVER}") from error
        found = {ERROR: str(error)}
    if at.joins:
        _join(at, config.guard.startup_timeout)
        agree(found)
    return config


def _join(at: Place, timeout: float) -> None:
    """Meet the others, or end with status 1: that is no mistake, another attempt has another port, or all nodes.

    Raises:
        Mistake: gloo is told to use a network interface that this machine doesn't have.
    """
    check_interfaces(os.environ)
    try:
        with waiting(at):
            resolve_host(at)
            join(timeout)
    except (RuntimeError, OSError) as error:  # gloo's and the store's are RuntimeErrors
        sys.stderr.write(f"error: {cannot_meet(at, error)}\n")
        sys.exit(FAILED)
