"""The rates of the device: told, measured, or unknown."""

import pytest
import torch

from spmd.bench.rates import Rates, device_rates
from spmd.config import BenchConfig

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_a_cpu_is_not_measured() -> None:
    assert device_rates(BenchConfig(), CPU, torch.float32) is None
    assert device_rates(BenchConfig(bandwidth=1e9), CPU, torch.float32) is None
    assert device_rates(BenchConfig(1e9, 2e9), CPU, torch.float32) == Rates(1e9, 2e9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_measured_and_left_as_it_was() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    rates = device_rates(BenchConfig(), CUDA, torch.bfloat16)
    assert rates is not None
    assert 1e11 < rates.bandwidth < 1e14 and 1e12 < rates.flops < 1e17
    assert torch.cuda.memory_reserved() <= before + 2**27, "but for cuBLAS's workspace"
    assert device_rates(BenchConfig(bandwidth=7.0), CUDA, torch.bfloat16).bandwidth == 7.0  # type: ignore[union-attr]
