"""Which implementation of the port computes a model on a device."""

import torch

from spmd.backend.cuda.flashinfer import why_not
from spmd.model.architecture import Architecture

BLOCK_SIZES = {"flashinfer": 64, "torch": 16}  # tokens of a KV block


def default_block_size(backend: str) -> int:
    """Tokens of one KV block. FlashInfer's decode reads blocks of 64 4 to 8 % faster than blocks of 16 (one H200)."""
    return BLOCK_SIZES[backend]


def choose_backend(asked: str, arch: Architecture, block_size: int | None, device: torch.device) -> str:
    """flashinfer or torch, as `model.attention_backend` asks, or what can run.

    Raises:
        ValueError: model.attention_backend=flashinfer asks for what can't be.
    """
    reason = why_not(arch, block_size or default_block_size("flashinfer"), device)
    if asked == "flashinfer" and reason:
        raise ValueError(f"model.attention_backend=flashinfer: {reason}; use model.attention_backend=auto")
    return "torch" if asked == "torch" or reason else "flashinfer"
