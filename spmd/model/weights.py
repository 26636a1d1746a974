"""How checkpoint tensors map onto a rank's parameters, and the one place where CPU weights are packed.

A module that owns parameters says, tensor by tensor, which slice of the checkpoint fills which part of them (`Piece`).
The loader knows nothing else about layers, fusing or splitting.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd.parallel.tensor import TensorParallel

Packed = Tensor | torch.ScriptObject  # the latter is FBGEMM's
FBGEMM = ("x86", "fbgemm")  # PyTorch's quantized engines that have it
TINY = 2.0**-25  # half of float16's smallest number


@dataclass(frozen=True)
class Piece:
    """`target` is filled with `tensor[index]`, where `tensor` is the checkpoint's `name`, of shape `shape`."""

    name: str
    target: Tensor
    shape: tuple[int, ...]
    index: tuple[slice, ...]


def whole(name: str, target: Tensor) -> Piece:
    """A tensor that every rank holds in full."""
    return Piece(name, target, tuple(target.shape), (slice(None),) * target.dim())


def shard(
    name: str, target: Tensor, dim: int, tp: TensorParallel, size: int | None = None, offset: int = 0, total: int = 0
) -> Piece:
    """This rank's slice along `dim` of a tensor split evenly over the tp ranks.

    Args:
        size: of the part that is split; less than the ranks hold together where the last ones are padded.
        offset, total: where the part begins within the tensor and the tensor's own size, if it holds several.
    """
    local = target.shape[dim]
    size = local * tp.size if size is None else size
    start, stop = (min(rank * local, size) for rank in (tp.rank, tp.rank + 1))
    shape, index = list(target.shape), [slice(None)] * target.dim()
    shape[dim], index[dim] = total or size, slice(offset + start, offset + stop)
    return Piece(name, target.narrow(dim, 0, stop - start), tuple(shape), tuple(index))


class Weights(nn.Module, ABC):
    """A module that owns parameters."""

    packable: tuple[str, ...] = ()  # those that `linear` multiplies with

    @abstractmethod
    def pieces(self, own: str) -> Iterator[Piece]:
        """Pieces of its parameters, named relative to the parent module, in which this one is called `own`."""

    def pack(self, rows: int) -> None:
        """Reorder its weights for forwards of about `rows` rows, where that is faster. No loading after it."""
        for name in self.packable:
            weight = getattr(self, name)
            delattr(self, name)
            setattr(self, name, packed(weight, rows))


def empty(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    """An uninitialised parameter on the default device."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """`x` `[T, in]` times `weight` `[out, in]` transposed, plus `bias`; the weight may be packed."""
    if not isinstance(weight, Tensor):
        product = torch.ops.quantized.linear_dynamic_fp16(x, weight)
        return product if bias is None else product.add_(bias)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def packed(weight: Tensor, rows: int) -> Packed | tuple[Packed, ...]:
    """`weight` in a library's own order for products with `rows` rows, on CPUs; elsewhere the weight itself.

    float32 weights that float16 holds go to FBGEMM, which reads half the bytes and multiplies in float32; others to
    oneDNN. `F.linear` reorders at every call; doing it once nearly doubles decode throughput (8 rows: 60 to 113 GFLOP/s
    in bf16 on AVX512; in float32 on AVX2, one core, 24 rows: 26 to 39 by oneDNN, to 60 by FBGEMM). Stacked weights
    become a tuple, since what is packed can't be indexed.
    """
    if weight.device.type != "cpu" or not _multiplies(weight.dtype):
        return weight
    if weight.dim() == 3:
        return tuple(_packed(matrix, rows) for matrix in weight.detach())
    return _packed(weight.detach(), rows)


def _packed(matrix: Tensor, rows: int) -> Packed:
    if matrix.dtype == torch.float32 and torch.backends.quantized.engine in FBGEMM and _fits_half(matrix):
        return torch.ops.quantized.linear_prepack_fp16(matrix, None)
    return torch.ops.mkldnn._reorder_linear_weight(matrix, rows)


def _fits_half(weight: Tensor) -> bool:
    """Whether float16 holds the weights, as it does a bfloat16 checkpoint's: exactly, but for tiny ones' last bits."""
    return bool((weight.half().float() - weight).abs().max() <= TINY)


def computed_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """What a model stored in `dtype` is best computed in: float32 on CPUs whose products in `dtype` are emulated.

    There float32 takes less than a fifth of the time (AVX2, 24 rows: 60 GFLOP/s a core, bf16 10), and, while weights
    are loaded, twice the memory.
    """
    return dtype if device != "cpu" or _multiplies(dtype) else torch.float32


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in `dtype` for this CPU."""
    ops: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    return {
        torch.float32: lambda: True,
        torch.bfloat16: ops._is_mkldnn_bf16_supported,
        torch.float16: ops._is_mkldnn_fp16_supported,
    }[dtype]()
