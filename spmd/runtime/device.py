"""Which device this rank computes on."""

import os

import torch


def choose_device(asked: str) -> torch.device:
    """This rank's device, which becomes the current one.

    Args:
        asked: auto, cpu or cuda.

    Raises:
        ValueError: cuda is asked for and not there, or has fewer devices than ranks on this machine.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise ValueError("device=cuda, but torch finds no CUDA device; use device=cpu")
    if asked == "cpu" or not available:
        _tune_cpu()
        return torch.device("cpu")
    ranks, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > count:
        raise ValueError(f"each of the {ranks} ranks on this machine needs a GPU of its own, it has {count}")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _tune_cpu() -> None:
    """Set what PyTorch and oneDNN read at their first large tensor or product, unless the user has.

    Huge pages: weights stream about a tenth faster. Kernel caches: both keep a compiled kernel, up to half a megabyte,
    for each shape they meet, 1024 by default, so that memory would grow for hours.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "512")
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
