"""Small numbers from Python lists onto the device, without making the host wait for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The nested sequence `values` as a tensor on `device`; for CUDA through pinned memory, asynchronously."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    # A copy from pageable memory would block; the caching host allocator keeps the pinned one until it is copied.
    return tensor.pin_memory().to(device, non_blocking=True)
