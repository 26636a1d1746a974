"""Prints, as shell assignments, what launch/slurm.sbatch needs to know of its job before it starts the ranks.

Checks the configuration against what the job really got. Imports no torch, so that a mistake shows in a second.
"""

import os
import shlex
import sys

from spmd.config_checks import check
from spmd.runtime.compose import compose, tell
from spmd.runtime.overrides import quoted
from spmd.runtime.slurm import allocation, check_processes, port, shard
from spmd.signals import USAGE


def settle() -> dict[str, str]:
    """The assignments, by name.

    Raises:
        ValueError: the job can't run this configuration.
    """
    config, job, part = compose(), allocation(os.environ), shard(os.environ)
    check_processes(config.topology, job.processes, f"the job's {job.nodes} nodes x {job.per_node} processes")
    check(config, job.processes)
    if part and config.shard:
        raise ValueError(f"shard={config.shard} in a job array, which sets it by itself")
    run_dir, overrides = config.run_dir or f"runs/{os.environ['SLURM_JOB_ID']}", []
    if part:
        overrides = [f"shard=[{part[0]},{part[1]}]"]
    if part and config.run_dir:  # of the whole array: each task needs a folder of its own
        run_dir = f"{run_dir}/{part[0]}"
        overrides.append(f"run_dir={quoted(run_dir)}")
    return {
        "native": str(int(job.native)),
        "per_node": str(job.per_node),
        "port": str(port(os.environ)),
        "run_dir": shlex.quote(run_dir),
        "overrides": f"({shlex.join(overrides)})",
    }


if __name__ == "__main__":
    try:
        settled = settle()
    except ValueError as error:
        tell(error)
        sys.exit(USAGE)
    for name, value in settled.items():
        print(f"{name}={value}")
