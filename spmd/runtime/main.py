"""What every main does before its work: find its place, agree with the other ranks, and speak with one voice.

An error that every rank sees alike is told by rank 0; one that a single rank sees is gathered and told by rank 0 too.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from spmd.config import Config, check, warnings
from spmd.guard.guard import is_symptom
from spmd.journal.locked_file import cannot_write
from spmd.messages import first_line
from spmd.parallel.groups import disconnect, join
from spmd.runtime.agreement import ERROR, agree, facts
from spmd.runtime.compose import CONF, USAGE, compose, tell
from spmd.runtime.slurm import adopt_slurm
from spmd.signals import STOPPED, Stop, listening, report
from spmd.topology import Topology

T = TypeVar("T")
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
    os.environ.setdefault("SPMD_HOME", str(CONF.parent))  # where model=demo lies
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
        os._exit(1)  # the interpreter's own end would wait for collectives that the other ranks can't finish


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
            sys.exit(1)
        agree(found)
    return config


def together(topology: Topology, step: Callable[[], T]) -> T:
    """Run a start-up step on every rank; if it fails on some, all ranks end with the first one's message.

    Raises:
        ValueError: on every rank alike, naming the rank that failed.
    """
    result, message = None, None
    try:
        result = step()
    except (ValueError, OSError) as error:
        message = f"{error} [rank {topology.rank}, {topology}]" if topology.world_size > 1 else str(error)
    messages: list[str | None] = [message]
    if topology.world_size > 1:
        messages = [None] * topology.world_size
        dist.all_gather_object(messages, message)
    if failed := next(filter(None, messages), None):
        raise ValueError(failed)
    return result  # type: ignore[return-value]  # set unless the step failed


def from_rank_0(topology: Topology, value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    if topology.world_size > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def choose_device(config: Config) -> torch.device:
    """This rank's device.

    Raises:
        ValueError: cuda is asked for and not there, or has fewer devices than ranks on this machine.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=cpu")
    if config.device == "cpu" or not available:
        _tune_cpu()
        return torch.device("cpu")
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > count:
        raise ValueError(f"each of the {ranks} ranks on this machine needs a GPU of its own, it has {count}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _tune_cpu() -> None:
    """Set what PyTorch and oneDNN read at their first large tensor or product, unless the user has.

    Huge pages: weights stream about a tenth faster. Kernel caches: both keep a compiled kernel, up to half a megabyte,
    for each shape they meet, 1024 by default, so that memory would grow for hours.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "512")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")


def open_run_dir(config: Config, topology: Topology) -> Path:
    """Log into the one folder for all ranks and return it: chosen by rank 0, whose clock and file system alone count.

    Raises:
        ValueError: it can't be made, or a rank can't write its log there.
    """
    chosen = together(topology, lambda: _make_run_dir(config) if topology.rank == 0 else "")
    run_dir = Path(from_rank_0(topology, chosen))
    together(topology, lambda: _log_to(run_dir / "logs" / f"rank-{topology.rank}.log"))
    log.info("rank %d of %d: %s", topology.rank, topology.world_size, topology)
    for warning in warnings(config):
        warn(warning, topology.rank)
    return run_dir


def warn(warning: str, rank: int) -> None:
    """Leave a warning in the log, and on rank 0 also on the terminal."""
    log.warning(warning)
    if rank == 0:
        sys.stderr.write(f"warning: {warning}\n")


def _make_run_dir(config: Config) -> str:
    started = time.strftime("%Y-%m-%d_%H-%M-%S")
    chosen = config.run_dir or f"runs/{os.environ.get('SLURM_JOB_ID', f'{started}-{os.getpid()}')}"
    logs = Path(chosen) / "logs"
    with _writing(logs.parent):
        if logs.exists():  # of an earlier attempt
            attempts = (logs.parent / f"logs.{number}" for number in count(1))
            logs.rename(next(path for path in attempts if not path.exists()))
        logs.mkdir(parents=True)
        (logs.parent / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return chosen


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(cannot_write(f"run_dir={run_dir}", run_dir, error)) from error


def _log_to(file: Path) -> None:
    with _writing(file.parent.parent):
        handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.raiseExceptions = False  # a disk that is full by now is told of elsewhere, once
