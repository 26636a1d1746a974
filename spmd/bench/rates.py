"""What the device can do at best: bytes moved and operations made in a second, as told or as measured on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from spmd.config import BenchConfig

COPIED = 2**29  # bytes; many times what a GPU's caches hold
SIDE = 8192  # of the square matrices multiplied
ROUNDS = 10


@dataclass(frozen=True)
class Rates:
    bandwidth: float  # bytes/s, read and written together
    flops: float  # operations/s


def device_rates(bench: BenchConfig, device: torch.device, dtype: torch.dtype) -> Rates | None:
    """The rates of `bench`; what it leaves open is measured on a GPU. None where one stays unknown: on a CPU."""
    bandwidth, flops = bench.bandwidth, bench.flops
    if device.type == "cuda":
        bandwidth, flops = bandwidth or _bandwidth(device), flops or _flops(device, dtype)
        torch.cuda.empty_cache()
    return Rates(bandwidth, flops) if bandwidth and flops else None


def _bandwidth(device: torch.device) -> float:
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED / _fastest(lambda: target.copy_(source))


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * SIDE**3 / _fastest(lambda: torch.mm(a, b, out=out))


def _fastest(step: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS runs, on the device's own clock."""
    step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    marks[-1].synchronize()
    fastest: float = min(before.elapsed_time(after) for before, after in pairwise(marks))
    return fastest / 1e3
