"""Submits launch/slurm.sbatch, once it has checked that the configuration fits the job it asks for:

launch/submit.py NODES=2 GPUS=8 TIME=04:00:00 topology.pp=16 model.path=DIR input=in.jsonl output=out.jsonl

Words in capitals are about the job, see OPTIONS; all others go to Hydra as they stand. Imports no torch.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from omegaconf import OmegaConf

from spmd.config_checks import check
from spmd.runtime.compose import compose, tell
from spmd.runtime.slurm import check_processes
from spmd.signals import USAGE

HOME = Path(__file__).resolve().parent.parent
OPTIONS = {
    "NODES": "1",
    "GPUS": "8",  # of a node, with one rank each
    "PROCS": "",  # ranks of a node without GPUs
    "CPUS": "",  # cores of a rank; 4, without GPUs 1
    "TIME": "",  # limit of one attempt, hh:mm:ss
    "NAME": "spmd",
    "PARTITION": "",
    "ACCOUNT": "",
    "NATIVE": "",  # 1: srun starts each rank itself, without torchrun
    "ARRAY": "",  # so many jobs, each for a part of the input; 8%2: no more than two at a time
    "SBATCH": "",  # more of sbatch's own options
    "DRY_RUN": "",  # 1: only print what would be submitted, and the whole configuration
}


def main(words: list[str]) -> int:
    """Check and submit, or print; sbatch's exit status.

    Raises:
        ValueError: an unknown option, a configuration that doesn't fit the job, or no sbatch.
    """
    options, overrides = parse(words)
    os.environ.setdefault("SPMD_HOME", str(HOME))
    sys.argv[1:] = overrides
    config = compose()
    nodes, per_node = number(options, "NODES"), number(options, "PROCS" if options["PROCS"] else "GPUS")
    size = f"NODES={nodes} x {'PROCS' if options['PROCS'] else 'GPUS'}={per_node}"
    check_processes(config.topology, nodes * per_node, size)
    check(config, nodes * per_node)
    if options["ARRAY"] and config.shard:
        raise ValueError(f"shard={config.shard} with ARRAY={options['ARRAY']}, which gives each job its own")
    command = [*sbatch(options, per_node), *overrides]
    if options["DRY_RUN"]:
        print(shlex.join(command), OmegaConf.to_yaml(OmegaConf.structured(config)), sep="\n\n", end="")
        return 0
    return submit(command)


def parse(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options, with their defaults, and what is Hydra's. An option set to nothing, or to 0, isn't set.

    Raises:
        ValueError: an option nobody knows, or GPUS and PROCS at once.
    """
    ours = dict(word.split("=", 1) for word in words if re.match("[A-Z_]+=", word))
    if unknown := ours.keys() - OPTIONS.keys():
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; the job's options are {', '.join(OPTIONS)}")
    given = {name: value for name, value in ours.items() if value and (value != "0" or name == "NODES")}
    if not re.fullmatch(r"\d+(%\d+)?", given.get("ARRAY", "1")):
        raise ValueError(f"ARRAY={given['ARRAY']} is no number of parts, nor, as 8%2, that and how many at a time")
    if "PROCS" in given and "GPUS" in given:
        raise ValueError("GPUS or PROCS, the ranks of a node with or without GPUs, not both")
    if ours.get("GPUS") == "0" and "PROCS" not in given:
        raise ValueError("GPUS=0 needs PROCS, the ranks of a node")
    return OPTIONS | given, [word for word in words if not re.match("[A-Z_]+=", word)]


def number(options: dict[str, str], name: str) -> int:
    """Raises: ValueError: not a whole number, at least 1."""
    if not re.fullmatch("0*[1-9][0-9]*", options[name]):
        raise ValueError(f"{name}={options[name]} is not a number, at least 1")
    return int(options[name])


def sbatch(options: dict[str, str], per_node: int) -> list[str]:
    """sbatch's command line, up to the overrides."""
    on_gpus, native = not options["PROCS"], bool(options["NATIVE"])
    cpus = number(options, "CPUS") if options["CPUS"] else 4 if on_gpus else 1
    variables = {"SPMD_HOME": HOME, "PYTHON": sys.executable, "SPMD_NATIVE": int(native)}
    if not on_gpus:
        variables["SPMD_PROCS"] = per_node
    flags = {
        "job-name": options["NAME"],
        "nodes": options["NODES"],
        "ntasks-per-node": per_node if native else 1,
        "gpus-per-node": per_node if on_gpus else 0,
        "cpus-per-task": cpus if native else cpus * per_node,
        "time": options["TIME"],
        "partition": options["PARTITION"],
        "account": options["ACCOUNT"],
        "output": "runs/slurm-%A_%a.out" if options["ARRAY"] else "runs/slurm-%j.out",
        "export": ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())]),
    }
    if options["ARRAY"]:
        count, _, at_once = options["ARRAY"].partition("%")
        flags["array"] = f"0-{int(count) - 1}" + (f"%{at_once}" if at_once else "")
    given = [f"--{name}={value}" for name, value in flags.items() if value != ""]
    return ["sbatch", *given, *shlex.split(options["SBATCH"]), str(HOME / "launch" / "slurm.sbatch")]


def submit(command: list[str]) -> int:
    Path("runs").mkdir(exist_ok=True)  # SLURM doesn't make the folder of a job's output
    try:
        return subprocess.run(command).returncode
    except FileNotFoundError:
        raise ValueError("no sbatch here: submit on a machine of the cluster; DRY_RUN=1 only prints") from None


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        tell(error)
        sys.exit(USAGE)
