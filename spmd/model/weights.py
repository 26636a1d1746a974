"""How checkpoint tensors map onto a rank's parameters.

A module that owns parameters says, tensor by tensor, which slice of the checkpoint fills which part of them (`Piece`).
The loader knows nothing else about layers, fusing or splitting.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spmd.model.linear import WeightFormat
from spmd.parallel.tensor import TensorParallel


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

    packable: tuple[str, ...] = ()  # names of the linear weights among them

    @abstractmethod
    def pieces(self, own: str) -> Iterator[Piece]:
        """Pieces of its parameters, named relative to the parent module, in which this one is called `own`."""

    def pack(self, rows: int) -> None:
        """Reorder its weights for forwards of about `rows` rows, where that is faster. No loading after it."""
        for name in self.packable:
            weight: WeightFormat = getattr(self, name)
            delattr(self, name)
            setattr(self, name, weight.packed(rows))


def empty(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    """An uninitialised parameter on the default device."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
