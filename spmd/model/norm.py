"""The norm of all supported families."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from spmd.model.architecture import Architecture
from spmd.model.weights import Piece, Weights, empty, whole


class RMSNorm(Weights):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, size: int, arch: Architecture) -> None:
        super().__init__()
        self.eps = arch.rms_norm_eps
        self.weight = empty(arch.dtype, size)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def pieces(self, own: str) -> Iterator[Piece]:
        yield whole(f"{own}.weight", self.weight)
