"""Process groups, made once at start-up, by every rank in the same order."""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from spmd.topology import Topology

LOADING = timedelta(days=30)  # start-up, and at the end the wait for the slowest replica
WORKING = timedelta(minutes=10)


@dataclass(frozen=True)
class Groups:
    """None where a group would have one rank: nothing is ever sent there."""

    packets: ProcessGroup | None = None  # the replica, on the CPU
    hidden: ProcessGroup | None = None  # the replica, on the device
    tensor: ProcessGroup | None = None  # the ranks of one stage, on the device


def connect(topology: Topology, device: torch.device) -> Groups:
    """Join the world started by torchrun. Its default group is for talk at start-up and at the end, on the CPU."""
    if topology.world_size == 1:
        return Groups()
    dist.init_process_group("gloo", timeout=LOADING)
    on_device = "nccl" if device.type == "cuda" else "gloo"
    return Groups(
        packets=_group_of(topology.rank, topology.replicas(), "gloo"),
        hidden=_group_of(topology.rank, topology.replicas(), on_device),
        tensor=_group_of(topology.rank, topology.stages(), on_device),
    )


def _group_of(rank: int, partition: list[list[int]], backend: str) -> ProcessGroup | None:
    """Make a group of each part (every rank must take part in making every group); returns the own one."""
    groups = [
        dist.new_group(ranks, timeout=WORKING, backend=backend) if len(ranks) > 1 else None for ranks in partition
    ]
    return next(group for group, ranks in zip(groups, partition, strict=True) if rank in ranks)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
