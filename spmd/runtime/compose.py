"""From the command line to a Config by way of Hydra, and from its complaints to one line. Imports no torch."""

import contextlib
import io
import os
import sys
import time
from dataclasses import FrozenInstanceError
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from spmd.config import Config
from spmd.runtime.environment import check_environment
from spmd.runtime.overrides import as_typed, hints

HOME = Path(__file__).parents[2]  # of a checkout, or the folder that a wheel was installed into
CONF = next(folder for folder in (HOME / "spmd" / "conf", HOME / "conf") if folder.is_dir())
PATIENCE = 20.0  # seconds rank 0 gets to tell an error before another rank does
# Lines of Hydra's error messages that tell a user of ours nothing, or, as the advice to append, mislead.
NOISE = (
    *("Set the environment variable", "To append to your config", "See https://hydra.cc", "Config search path"),
    *("^", "provider=", "full_key:", "reference_type=", "object_type="),
)


def compose(quiet: bool = False) -> Config:
    """What Hydra makes of the command line. `--help` and `--cfg` print and exit.

    Hydra runs nothing here: it would wrap and shorten the work's own errors. `quiet` ranks print nothing.

    Raises:
        ValueError: an unknown key, a value of the wrong type, no override at all, or a sweep.
    """
    check_environment(os.environ)
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        raise ValueError("--multirun would sweep inside every rank; sweep outside, one launch a point")
    sys.argv[1:] = as_typed(sys.argv[1:])
    composed: list[DictConfig] = []

    def keep(cfg: DictConfig) -> None:
        composed.append(cfg)

    os.environ.setdefault("SPMD_HOME", str(HOME))  # where model=demo lies
    os.environ.setdefault("SPMD_CONF", str(CONF))  # where the shapes of benches lie
    register_schema()
    complaints = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(complaints))
        if quiet:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        try:
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(keep)()
        except SystemExit as end:
            if not end.code:
                raise
            said = complaints.getvalue().strip().rpartition("error: ")[2]  # argparse's usage stands before
            raise ValueError("\n".join([said, *hints(said)])) from None
    if not quiet:
        sys.stderr.write(complaints.getvalue())
    if not composed:
        sys.exit()
    return from_hydra(composed[0])


def register_schema() -> None:
    """Give Hydra the schema under the name conf/config.yaml starts from.

    OmegaConf takes a frozen dataclass for a read-only node, which would refuse every override: the flag is lifted.
    """
    ConfigStore.instance().store(name="schema", node=_writable(OmegaConf.structured(Config)))


def from_hydra(cfg: DictConfig) -> Config:
    """The frozen Config of a composed Hydra configuration.

    Raises:
        ValueError: it has a key that is none of ours; with a + before it Hydra lets it pass.
    """
    try:
        config = OmegaConf.to_object(cfg)
    except FrozenInstanceError as error:
        raise ValueError(f"unknown key {str(error).split()[-1]}, added with +") from error
    assert isinstance(config, Config)
    return config


def tell(error: ValueError, rank: int = 0) -> None:
    """Print an error as one line, on rank 0.

    torchrun ends all ranks as soon as one exits, so the others leave that to rank 0. One that is still there after
    a while saw an error that rank 0 didn't.
    """
    if rank:
        time.sleep(PATIENCE + rank)
    lines = (line.strip() for line in str(error).splitlines())
    told = ": ".join(line.rstrip(".:") for line in lines if line and not line.startswith(NOISE))
    sys.stderr.write(f"error: {told}\n")


def _writable(node: DictConfig) -> DictConfig:
    OmegaConf.set_readonly(node, None)
    if node._metadata.object_type is dict:
        OmegaConf.set_struct(node, False)  # model.overrides takes any key of config.json
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _writable(child)
    return node
