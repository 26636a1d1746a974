"""What every main does before its work: compose the configuration, find its place, and speak with one voice.

An error that every rank sees alike is told by rank 0; one that a single rank sees is gathered and told by rank 0 too.
"""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from spmd.config import Config, check, from_hydra, register_schema, warnings
from spmd.parallel.groups import disconnect
from spmd.topology import Topology

CONF = Path(__file__).parent.parent / "conf"
USAGE = 2  # exit status of an error the user can mend

T = TypeVar("T")
log = logging.getLogger("spmd")


def main(work: Callable[[Config, Topology], None]) -> None:
    """Compose the configuration from the command line and run `work` on this rank.

    A ValueError becomes one line from rank 0 and exit status 2, without a traceback.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        composed = _compose(quiet=rank != 0)
        if not composed:  # --help or --cfg
            return
        if len(composed) > 1:
            raise ValueError("--multirun starts one sweep on every rank; sweep outside, one torchrun a point")
        config = from_hydra(composed[0])
        check(config, int(os.environ.get("WORLD_SIZE", "1")))
        t = config.topology
        work(config, Topology(t.dp, t.pp, t.tp, rank))
    except ValueError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USAGE)
    finally:
        disconnect()


def _compose(quiet: bool) -> list[DictConfig]:
    """What Hydra makes of the command line. It runs nothing: it would wrap and shorten the work's own errors."""
    composed: list[DictConfig] = []

    def keep(cfg: DictConfig) -> None:
        composed.append(cfg)

    register_schema()
    nowhere = io.StringIO()
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(keep)()
    return composed


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


def choose_device(config: Config) -> torch.device:
    """This rank's device.

    Raises:
        ValueError: cuda is asked for and not there, or has fewer devices than ranks on this machine.
    """
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=cpu")
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(f"local rank {local} needs a GPU of its own, this machine has {count}")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def open_run_dir(config: Config, topology: Topology) -> Path:
    """The one folder for logs of all ranks: chosen by rank 0, whose clock and file system alone count."""
    chosen: list[str] = [""]
    if topology.rank == 0:
        started = time.strftime("%Y-%m-%d_%H-%M-%S")
        chosen = [config.run_dir or f"runs/{os.environ.get('SLURM_JOB_ID', f'{started}-{os.getpid()}')}"]
        logs = Path(chosen[0]) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        (logs.parent / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    if topology.world_size > 1:
        dist.broadcast_object_list(chosen, src=0)
    run_dir = Path(chosen[0])
    handler = logging.FileHandler(run_dir / "logs" / f"rank-{topology.rank}.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    log.info("rank %d of %d: %s", topology.rank, topology.world_size, topology)
    for warning in warnings(config):
        log.warning(warning)
        if topology.rank == 0:
            print(f"warning: {warning}", file=sys.stderr)
    return run_dir
