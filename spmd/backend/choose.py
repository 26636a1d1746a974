"""Which backend computes a model on a device, and the one place where one is made."""

from collections.abc import Sequence
from typing import Literal

import torch

from spmd.backend.cuda.decode_gemm import DecodeGemm, supported
from spmd.backend.cuda.limits import capturable, runs_experts, why_not
from spmd.backend.cuda.sampler import CudaSampler
from spmd.backend.cuda.sampler import supported as supported_sampler
from spmd.backend.kv_cache import KVCache
from spmd.backend.plain.backend import PlainBackend
from spmd.integers import ceil_div
from spmd.model.architecture import Architecture
from spmd.model.backend import Backend
from spmd.model.decoder import Decoder
from spmd.model.layers import ColumnLinear, GatedLinear, RowLinear
from spmd.model.linear import Dense
from spmd.parallel.peer_memory import PeerMemory, share, size_of, within_reach
from spmd.sampling.sampler import Sampler

Name = Literal["flashinfer", "torch"]


def choose_backend(asked: str, arch: Architecture, block_size: int | None, device: torch.device) -> Name:
    """The backend for a model on a device: FlashInfer's where it can be.

    Args:
        asked: model.attention_backend: auto, flashinfer or torch.
        block_size: tokens of a KV block; None: the backend's own default.

    Raises:
        ValueError: flashinfer is asked for and can't be.
    """
    reason = why_not(arch, block_size or default_block_size("flashinfer"), device)
    if asked == "flashinfer" and reason:
        raise ValueError(f"model.attention_backend=flashinfer: {reason}; use model.attention_backend=auto")
    return "torch" if asked == "torch" or reason else "flashinfer"


def default_block_size(name: Name) -> int:
    """Tokens of a KV block. FlashInfer's decode reads blocks of 64 4 to 8 % faster than blocks of 16 (one H200)."""
    return 64 if name == "flashinfer" else 16


def make_backend(
    name: Name,
    decoder: Decoder,
    cache: KVCache,
    longest: int,
    decode_buckets: Sequence[int] = (),
    decode_products: bool = True,
) -> Backend:
    """The backend of one stage.

    Args:
        longest: tokens of the longest request.
        decode_buckets: row counts that graphs will be captured of, if the backend is capturable.
        decode_products: leave the products of decode batches to our own kernel, where it can do them.
    """
    arch, layers, tp = decoder.arch, decoder.range, decoder.tp.size
    if name == "torch":
        return PlainBackend(arch, layers, cache, tp, longest)
    from spmd.backend.cuda.backend import CudaBackend
    from spmd.backend.cuda.flashinfer import FlashInferAttention

    buckets = decode_buckets if capturable(arch) else ()
    by_gemm = buckets and decode_products and arch.dtype == torch.bfloat16 and supported(cache.device)
    gemm = DecodeGemm(_shapes(decoder), buckets, cache.device) if by_gemm else None
    windows, most_blocks = {arch.windows[layer] for layer in layers}, ceil_div(longest, cache.block_size)
    attention = FlashInferAttention(cache, arch.num_heads // tp, windows, buckets, most_blocks)
    return CudaBackend(arch, cache, attention, gemm)


def make_sampler(arch: Architecture, device: torch.device) -> Sampler | CudaSampler:
    """What chooses tokens on a leader: our kernel where there is a GPU for it, else plain PyTorch; equal tokens."""
    if supported_sampler(arch.dtype, device):
        return CudaSampler(arch.vocab_size, arch.dtype, device)
    return Sampler(arch.vocab_size, device)


def _shapes(decoder: Decoder) -> list[tuple[int, int, bool]]:
    """Of the weights that a decode batch is multiplied with: outputs, inputs, and whether gate and up follow."""
    kinds = (ColumnLinear,) if decoder.tp.size > 1 else (ColumnLinear, RowLinear)  # partial sums go where others read
    linears = [module for module in decoder.modules() if isinstance(module, kinds)]
    dense = [(linear.weight, isinstance(linear, GatedLinear)) for linear in linears]
    return [(*weight.values.shape, gated) for weight, gated in dense if isinstance(weight, Dense)]


def exchange_bytes(name: Name, arch: Architecture, replicas: int, rows: int) -> int:
    """Bytes of a rank's memory in which other replicas leave rows for its experts; 0 where no kernels use that.

    Args:
        replicas: that share the experts.
        rows: of each of them in the largest batch.
    """
    if name != "flashinfer" or replicas == 1 or not runs_experts(arch):
        return 0
    return size_of(replicas, *_exchanged(arch, replicas, rows))


def share_exchange_memory(
    name: Name, arch: Architecture, group: torch.distributed.ProcessGroup | None, rows: int, device: torch.device
) -> PeerMemory | None:
    """That memory, where there is any and the group's GPUs see each other's; all of the group must call this."""
    if group is None or not exchange_bytes(name, arch, group.size(), rows) or not within_reach(group, device):
        return None
    return share(group, *_exchanged(arch, group.size(), rows), device)


def _exchanged(arch: Architecture, replicas: int, rows: int) -> tuple[int, int, int]:
    """Rows of all replicas in the largest exchange, columns of a row, of a sum."""
    return replicas * rows, arch.hidden_size + 2 * arch.experts_per_token, arch.hidden_size
