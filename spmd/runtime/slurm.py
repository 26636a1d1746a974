"""What SLURM's variables say about a job: the processes it has room for, a rank's place in it, the part of the input.

Reads environment variables and nothing else: no SLURM command, no torch.
"""

import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from spmd.config import TopologyConfig

PORTS = range(10_000, 30_000)  # below those that Linux hands out by itself


@dataclass(frozen=True)
class Allocation:
    """The processes of a batch job: `per_node` on each of `nodes`, started by torchrun or, if `native`, by srun."""

    nodes: int
    per_node: int
    native: bool

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node


def allocation(environ: Mapping[str, str]) -> Allocation:
    """What a batch script got. More tasks than nodes, or SPMD_NATIVE=1: a task a rank; else torchrun starts a node's.

    Raises:
        ValueError: there is no telling how many processes a node should run, or nodes would run different numbers.
    """
    nodes = _number(environ, "SLURM_JOB_NUM_NODES")
    tasks = int(environ.get("SLURM_NTASKS", nodes))
    if tasks % nodes:
        raise ValueError(f"{tasks} tasks don't spread evenly over {nodes} nodes; use --ntasks-per-node")
    if tasks > nodes or environ.get("SPMD_NATIVE") == "1":
        return Allocation(nodes, tasks // nodes, native=True)
    per_node = environ.get("SPMD_PROCS") or environ.get("SLURM_GPUS_ON_NODE")
    if not per_node:
        raise ValueError("the job has neither GPUs (--gpus-per-node) nor SPMD_PROCS, the processes of a node")
    return Allocation(nodes, int(per_node), native=False)


def check_processes(topology: TopologyConfig, processes: int, room: str) -> None:
    """Compare what the topology needs with what a job has; `room` says how that came about.

    Raises:
        ValueError: they differ.
    """
    needed = topology.dp * topology.pp * topology.tp
    if needed != processes:
        raise ValueError(
            f"topology.dp={topology.dp} x topology.pp={topology.pp} x topology.tp={topology.tp} needs {needed} "
            f"processes, {room} gives {processes}; change the topology or the job's size"
        )


def shard(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Which part of how many a task of a job array answers; None outside of an array.

    SPMD_SHARDS says of how many where only some tasks of an array run again; task i is then part i.

    Raises:
        ValueError: the array's indices leave gaps, so that parts of the input would be left out or answered twice.
    """
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    index = _number(environ, "SLURM_ARRAY_TASK_ID")
    if shards := environ.get("SPMD_SHARDS"):
        return index, int(shards)
    first, last, step, count = (
        _number(environ, f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX", "STEP", "COUNT")
    )
    if (last - first) % step or (last - first) // step + 1 != count:
        raise ValueError(
            f"{count} array tasks from {first} to {last} leave gaps: use --array=0-{count - 1}, or say with "
            f"SPMD_SHARDS=n of how many parts these are some"
        )
    return (index - first) // step, count


def port(environ: Mapping[str, str]) -> int:
    """Where a job's ranks meet: the same on all its nodes, another for each job, step and attempt."""
    job = _number(environ, "SLURM_JOB_ID")
    attempt, step = (int(environ.get(name, 0)) for name in ("SLURM_RESTART_COUNT", "SLURM_STEP_ID"))
    return PORTS[(31 * job + 7 * attempt + step) % len(PORTS)]


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Set what torchrun would set, for a rank that srun started as a task of its own.

    Nothing is done where torchrun did, or where this is no task of a step of several. Where our own launcher says that
    each task is a rank (SPMD_NATIVE=1), a RANK left over in the shell that submitted the job doesn't count.

    Raises:
        ValueError: SLURM's variables are incomplete.
    """
    set_before = "RANK" in environ and environ.get("SPMD_NATIVE") != "1"
    if set_before or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return
    node = _number(environ, "SLURM_NODEID")
    place = {
        "RANK": _number(environ, "SLURM_PROCID"),
        "WORLD_SIZE": _number(environ, "SLURM_STEP_NUM_TASKS"),
        "LOCAL_RANK": _number(environ, "SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": _per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE"))[node],
    }
    environ.update({name: str(value) for name, value in place.items()})
    environ.setdefault("MASTER_ADDR", first_host(_text(environ, "SLURM_STEP_NODELIST")))
    environ.setdefault("MASTER_PORT", str(port(environ)))


def first_host(nodelist: str) -> str:
    """The first host of a list as SLURM writes it: node1 of `node[1-3,7],gpu5`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else nodelist


def _per_node(counts: str) -> list[int]:
    """Tasks of each node, of what SLURM writes as `2(x3),1`."""
    spans = (re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", span) for span in counts.split(","))
    return [int(span[1]) for span in spans if span for _ in range(int(span[2] or 1))]


def _text(environ: Mapping[str, str], name: str) -> str:
    if name not in environ:
        raise ValueError(f"{name} is not set: SLURM sets it in a batch job and in what srun starts")
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    return int(_text(environ, name))
