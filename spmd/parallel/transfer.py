"""Small numbers between Python lists and the device, without making the host wait for the device's other work."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def on_host(values: Sequence[Any] | npt.NDArray[Any], dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """`torch.tensor(values, dtype=dtype)`, several times faster for the few hundred numbers of a tick."""
    tensor = torch.from_numpy(np.array(values)).to(dtype)
    return tensor.pin_memory() if pinned else tensor


def to_device(values: Sequence[Any] | npt.NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The nested sequence `values` as a tensor on `device`; for CUDA through pinned memory, asynchronously."""
    if device.type != "cuda":
        return on_host(values, dtype).to(device)
    # A copy from pageable memory would block; the caching host allocator keeps the pinned one until it is copied.
    return on_host(values, dtype, pinned=True).to(device, non_blocking=True)


class HostCopy:
    """A tensor's values on their way to the host. They set out when this is made, after the stream's work so far."""

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.to("cpu", non_blocking=True)  # from CUDA: into pinned memory
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The values, on the CPU; waits for their arrival and for nothing that was launched later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values
