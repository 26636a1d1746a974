"""The formats that a linear layer's weight comes in: tensors, their names in a checkpoint, and the product.

Weights are loaded as a `WeightFormat`, of which there is one so far, `Dense`; a model names its own in
`Architecture.weight_format`. Another, such as 8-bit blocks with scales, is one more class: layers and the loader ask
the format for all that differs, and the estimates of memory and cost count its tensors. On CPUs `Dense.packed` turns
loaded weights into what a library multiplies with faster, `OneDNN` or `FBGEMM`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spmd.messages import show

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER_NAMES = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
FBGEMM_ENGINES = ("x86", "fbgemm")  # PyTorch's quantized engines that have it
TINY = 2.0**-25  # half of float16's smallest number


class Weight(Protocol):
    """A weight `[out, in]` that can be multiplied with."""

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """`x` `[T, in]` times the weight transposed, plus `bias`: `[T, out]`, written to `out` if that is given."""


class WeightStack(Protocol):
    """Several of one shape, `[n, out, in]`."""

    def __getitem__(self, index: int, /) -> Weight: ...


class Stored(NamedTuple):
    """One of the tensors that a weight consists of."""

    suffix: str  # of its name in a checkpoint, behind the linear's own
    tensor: Tensor
    block: int = 1  # one of its numbers stands for so many rows, and columns, of the weight


class WeightFormat(nn.Module, ABC):
    """A `Weight`, or a `WeightStack`, whose tensors are parameters that can be loaded."""

    @abstractmethod
    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        """Uninitialised, on the default device. `dtype`: that the model is computed in."""
        super().__init__()

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def __getitem__(self, index: int, /) -> Weight: ...

    @abstractmethod
    def stored(self) -> Iterator[Stored]:
        """Its tensors; over the ranks all are split alike."""

    def packed(self, rows: int) -> Weight | WeightStack:
        """The same in another order for products with about `rows` rows, where that is faster. No loading after it."""
        return self


class Dense(WeightFormat):
    """One tensor of numbers of the dtype that is computed in."""

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        super().__init__(dtype, *shape)
        self.values = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self._matrices: tuple[Matrix, ...] = ()

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return _dense(x, self.values, bias, out)

    def __getitem__(self, index: int, /) -> Weight:
        """Made once: a stack must not be moved to another device after this."""
        self._matrices = self._matrices or tuple(map(Matrix, self.values.detach()))
        return self._matrices[index]

    def stored(self) -> Iterator[Stored]:
        yield Stored("weight", self.values)

    def packed(self, rows: int) -> Weight | WeightStack:
        """In a library's own order, on CPUs; elsewhere as it is.

        float32 weights that float16 holds go to FBGEMM, which reads half the bytes and multiplies in float32; others to
        oneDNN. `F.linear` reorders at every call; doing it once nearly doubles decode throughput (8 rows: 60 to 113
        GFLOP/s in bf16 on AVX512; in float32 on AVX2, one core, 24 rows: 26 to 39 by oneDNN, to 60 by FBGEMM). A stack
        becomes a tuple, since what is packed can't be indexed.
        """
        values = self.values.detach()
        if values.device.type != "cpu" or not _multiplies(values.dtype):
            return self
        return tuple(_packed(matrix, rows) for matrix in values) if values.dim() == 3 else _packed(values, rows)


@dataclass(frozen=True)
class Matrix:
    """A dense weight out of a stack."""

    values: Tensor

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        return _dense(x, self.values, bias, out)


@dataclass(frozen=True)
class OneDNN:
    """A weight in oneDNN's order."""

    reordered: Tensor

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.reordered, bias, "none", [], "")
        return product if out is None else out.copy_(product)


@dataclass(frozen=True)
class FBGEMM:
    """A float32 weight that FBGEMM holds in float16."""

    reordered: torch.ScriptObject

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.reordered)
        product = product if bias is None else product.add_(bias)
        return product if out is None else out.copy_(product)


def _dense(x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, values, bias)
    assert bias is None, "every rank would add it to its part of a sum"
    return torch.mm(x, values.t(), out=out)


def _packed(matrix: Tensor, rows: int) -> Weight:
    ops: Any = torch.ops
    if matrix.dtype == torch.float32 and torch.backends.quantized.engine in FBGEMM_ENGINES and _fits_half(matrix):
        return FBGEMM(ops.quantized.linear_prepack_fp16(matrix, None))
    return OneDNN(ops.mkldnn._reorder_linear_weight(matrix, rows))


def _fits_half(weight: Tensor) -> bool:
    """Whether float16 holds the weights, as it does a bfloat16 checkpoint's: exactly, but for tiny ones' last bits."""
    return bool((weight.half().float() - weight).abs().max() <= TINY)


def stored_dtype(name: Any, asked: str = "auto") -> torch.dtype:
    """The dtype of that name in config.json; float32 where it names none, or leaves it to the reader.

    Args:
        asked: model.dtype, which counts where the name is none that a weight here can have.

    Raises:
        ValueError: neither can be.
    """
    if name in (None, "auto"):
        return torch.float32
    plain = str(name).lower().removeprefix("torch.")
    stored = DTYPES.get(OTHER_NAMES.get(plain, plain), DTYPES.get(asked))
    if stored is None:
        raise ValueError(f"dtype={show(name)} is not one of {', '.join(DTYPES)}: model.dtype=bfloat16 names another")
    return stored


def computed_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """What a model stored in `dtype` is best computed in: float32 on CPUs whose products in `dtype` are emulated.

    There float32 takes less than a fifth of the time (AVX2, 24 rows: 60 GFLOP/s a core, bf16 10), and, while weights
    are loaded, twice the memory.
    """
    return dtype if device != "cpu" or _multiplies(dtype) else torch.float32


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products in `dtype` for this CPU."""
    ops, mkldnn = torch.ops.mkldnn, torch.backends.mkldnn
    if not mkldnn.is_available() or not hasattr(ops, "_linear_pointwise"):
        return False
    known = {torch.bfloat16: ops._is_mkldnn_bf16_supported, torch.float16: ops._is_mkldnn_fp16_supported}
    return dtype == torch.float32 or bool(known[dtype]())
