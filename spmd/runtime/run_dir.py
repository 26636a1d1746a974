"""The folder of a run: the logs of all ranks, and the record of what ran."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from omegaconf import OmegaConf

from spmd.config_checks import warnings
from spmd.messages import cannot_write
from spmd.runtime.agreement import from_rank_0, together
from spmd.runtime.environment import environment_warnings
from spmd.settings import Settings
from spmd.topology import Topology

log = logging.getLogger("spmd")


def open_run_dir(settings: Settings, topology: Topology) -> Path:
    """Log into the one folder for all ranks and return it: chosen by rank 0, whose clock and file system alone count.

    Raises:
        ValueError: it can't be made, or a rank can't write its log there.
    """
    folders = ("logs", "trace") if settings.trace else ("logs",)
    chosen = together(topology, lambda: _make_run_dir(settings.run_dir, folders) if topology.rank == 0 else "")
    run_dir = Path(from_rank_0(topology, chosen))
    together(topology, lambda: _log_to(run_dir / "logs" / f"rank-{topology.rank}.log"))
    log.info("rank %d of %d: %s", topology.rank, topology.world_size, topology)
    for warning in (*warnings(settings), *environment_warnings(os.environ)):
        warn(warning, topology.rank)
    return run_dir


def record(settings: Settings, run_dir: Path, topology: Topology) -> None:
    """Leave the keys of the configuration as they came out in `config.yaml`, on rank 0.

    Raises:
        ValueError: it can't be written.
    """
    if topology.rank == 0:
        with _writing(run_dir):
            values = settings.as_config() | {"run_dir": str(run_dir)}
            (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))


def warn(warning: str, rank: int) -> None:
    """Leave a warning in the log, and on rank 0 also on the terminal."""
    log.warning(warning)
    if rank == 0:
        sys.stderr.write(f"warning: {warning}\n")


def _make_run_dir(asked: str | None, folders: Sequence[str]) -> str:
    started = time.strftime("%Y-%m-%d_%H-%M-%S")
    chosen = asked or f"runs/{os.environ.get('SLURM_JOB_ID', f'{started}-{os.getpid()}')}"
    with _writing(Path(chosen)):
        for folder in (Path(chosen) / name for name in folders):
            if folder.exists():  # of an earlier attempt
                attempts = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
                folder.rename(next(path for path in attempts if not path.exists()))
            folder.mkdir(parents=True)
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
