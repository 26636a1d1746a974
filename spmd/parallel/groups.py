"""Process groups, made once at start-up, by every rank in the same order."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup

from spmd.topology import Topology

LONG = 20  # times the guard's timeout after which a wait ends by itself: the guard has ended the run before


@dataclass(frozen=True)
class Groups:
    """None where a group would have one rank: nothing is ever sent there."""

    packets: ProcessGroup | None = None  # the replica, on the CPU
    hidden: ProcessGroup | None = None  # the replica, on the device
    tensor: ProcessGroup | None = None  # the ranks of one stage, on the device
    load: ProcessGroup | None = None  # one rank of each replica, of the same stage and tensor rank, on the CPU
    experts: ProcessGroup | None = None  # the same ranks, on the device; made for expert parallelism
    tokens: ProcessGroup | None = None  # the replica's first stage and its leader, on the device; made for lookahead


def join(timeout: float = 3600.0) -> None:
    """Join the world started by torchrun. Its default group is for talk at start-up and at the end, on the CPU.

    `timeout`: seconds that the slowest rank may be behind, with its weights loaded.

    With TORCH_DISTRIBUTED_DEBUG=DETAIL a group's ranks would meet in one more collective before each of ours, while
    here a stage may send its next message before another has taken the last one: that level is taken as INFO.

    torchrun keeps one store over its restarts of the ranks. Each attempt has keys of its own there, or ranks would find
    the addresses that those of the attempt before have left.
    """
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:
        dist.set_debug_level(dist.DebugLevel.INFO)
    patience = timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    attempt = PrefixStore(f"attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=attempt, rank=rank, world_size=world_size, timeout=patience)


def connect(
    topology: Topology, device: torch.device, lookahead: bool = False, ep: bool = False, timeout: float = 30.0
) -> Groups:
    """Make all groups, of the world that was joined or is now. `timeout`: the guard's, in seconds."""
    if topology.world_size == 1:
        return Groups()
    if not dist.is_initialized():
        join()
    on_device = "nccl" if device.type == "cuda" else "gloo"

    def group(parts: list[list[int]], backend: str) -> ProcessGroup | None:
        return _group_of(topology.rank, parts, backend, timedelta(seconds=LONG * timeout))

    return Groups(
        packets=group(topology.replicas(), "gloo"),
        hidden=group(topology.replicas(), on_device),
        tensor=group(topology.stages(), on_device),
        load=group(_peers(topology), "gloo"),
        experts=group(_peers(topology), on_device) if ep else None,
        tokens=group(_ends(topology), on_device) if lookahead else None,
    )


def _peers(topology: Topology) -> list[list[int]]:
    """Of each stage and tensor rank, those of all replicas."""
    return [list(ranks) for ranks in zip(*topology.replicas(), strict=True)]


def _ends(topology: Topology) -> list[list[int]]:
    """Of each replica the first stage's ranks and the leader."""
    return [sorted({*ranks[: topology.tp], ranks[-topology.tp]}) for ranks in topology.replicas()]


def _group_of(rank: int, parts: list[list[int]], backend: str, timeout: timedelta) -> ProcessGroup | None:
    """Make a group of each part (every rank must take part in making every group); returns the own one, if any."""
    groups = [dist.new_group(ranks, timeout=timeout, backend=backend) if len(ranks) > 1 else None for ranks in parts]
    return next((group for group, ranks in zip(groups, parts, strict=True) if rank in ranks), None)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
