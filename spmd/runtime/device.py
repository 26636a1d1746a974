"""Which device this rank computes on."""

import os

import torch
import torch.distributed as dist

from spmd.runtime.agreement import host
from spmd.topology import Topology


def choose_device(asked: str) -> torch.device:
    """This rank's device, which becomes the current one.

    Args:
        asked: auto, cpu or cuda.

    Raises:
        ValueError: cuda is asked for and not there, or has fewer devices than ranks on this machine. A single one may
            be another for each rank, as with SLURM's --gpus-per-task: see `check_own_gpus`.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=cpu")
    if asked == "cpu" or not available:
        _tune_cpu()
        return torch.device("cpu")
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > count > 1:
        raise ValueError(f"each of the {ranks} ranks on this machine needs a GPU of its own, it has {count}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    torch.cuda.set_device(device)
    return device


def check_own_gpus(device: torch.device, topology: Topology) -> None:
    """Check that no two ranks have the same GPU; every rank of the default process group calls this.

    Raises:
        ValueError: on every rank alike, naming the first two that do.
    """
    if device.type != "cuda" or topology.world_size == 1:
        return
    own = f"{torch.cuda.get_device_properties(device).uuid} on {host()}"  # a machine's name tells copies of it apart
    everyone = [""] * topology.world_size
    dist.all_gather_object(everyone, own)
    holders: dict[str, int] = {}
    for rank, gpu in enumerate(everyone):
        if (first := holders.setdefault(gpu, rank)) != rank:
            raise ValueError(
                f"ranks {first} and {rank} have the same GPU, {gpu}: each needs one of its own; start fewer ranks on "
                f"that machine, or let each see another one (CUDA_VISIBLE_DEVICES, SLURM's --gpus-per-task)"
            )


def _tune_cpu() -> None:
    """Set what PyTorch and oneDNN read at their first large tensor or product, unless the user has.

    Huge pages: weights stream about a tenth faster. Kernel caches: both keep a compiled kernel, up to half a megabyte,
    for each shape they meet, 1024 by default, so that memory would grow for hours.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "512")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
