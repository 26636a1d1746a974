"""What the kernels can do and what they take, known without loading them: for planning where there is no GPU."""

import sys
from importlib.util import find_spec

import torch

from spmd.model.architecture import Architecture

WORKSPACE_BYTES = 384 * 2**20  # partial results of attention over split key ranges; there are two such buffers
HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128)
CAPABILITY = (9, 0)  # FlashInfer's XQA: Hopper and later


def runs_experts(arch: Architecture) -> bool:
    """Whether our kernels run a model's experts; else plain PyTorch does, whose host must know each one's tokens."""
    return arch.dtype == torch.bfloat16


def capturable(arch: Architecture) -> bool:
    """Whether a CUDA graph can hold a forward of decode rows."""
    return runs_experts(arch) or not arch.num_experts


def why_not(arch: Architecture, block_size: int, device: torch.device) -> str | None:
    """What keeps the kernels from running a model on a device; None if nothing does.

    A machine without a GPU that asks about one plans for another machine, whose GPUs are taken to be able to.
    """
    if device.type != "cuda":
        return f"it needs a GPU, the device is {device.type}"
    here = torch.cuda.is_available()
    if here and (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return f"it needs compute capability {CAPABILITY}, the device has {capability}"
    if arch.dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, the model is {arch.dtype}"
    if arch.head_dim not in HEAD_DIMS:
        return f"it takes heads of {HEAD_DIMS} dimensions, the model's have {arch.head_dim}"
    if block_size not in BLOCK_SIZES:
        return f"it takes blocks of {BLOCK_SIZES} tokens, scheduler.block_size is {block_size}"
    if here and not find_spec("flashinfer"):
        return f"flashinfer is not installed: {sys.executable} -m pip install flashinfer-python"
    return None
