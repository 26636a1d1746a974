"""Prints how many processes a run needs: dp * pp * tp of the composed config, which it checks on the way.

Imports no torch, so that a mistake shows in a second, once, and before any rank starts.
"""

import sys

import hydra
from omegaconf import DictConfig

from spmd.config import check, from_hydra, register_schema


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    config = from_hydra(cfg)
    size = config.topology.dp * config.topology.pp * config.topology.tp
    try:
        check(config, size)
    except ValueError as error:
        sys.exit(str(error))
    print(size)


if __name__ == "__main__":
    if {"-m", "--multirun"} & set(sys.argv):
        sys.exit("--multirun would sweep inside every rank; launch once for each point of the sweep instead")
    register_schema()
    main()
