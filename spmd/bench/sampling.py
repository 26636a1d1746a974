"""What sampling costs in a decode tick: on the device, and on the host, which runs ahead of it.

python -m spmd.bench.sampling [rows ...]

Of each kind of row: the argmax of greedy ones, plain PyTorch's sampler and the kernel's, at Qwen3's vocabulary.
"""

import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from spmd.backend.cuda.sampler import CudaSampler, supported
from spmd.parallel.tensor import likeliest
from spmd.sampling.sampler import Sampled, Sampler
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams

VOCAB, DTYPE = 151_936, torch.bfloat16
ROWS = (8, 16, 64, 128, 256, 512)
KINDS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "0.6, top_p 0.95, top_k 20": {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    "top_p 0.95": {"top_p": 0.95},
    "min_p 0.05": {"min_p": 0.05},
    "logprobs 0": {"logprobs": 0},
    "logprobs 5": {"logprobs": 5},
    "0.7, top_p 0.8, top_k 20, repetition 1.05": {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.05,
    },
    "greedy, min_tokens": {"temperature": 0.0, "min_tokens": 100_000, "eos_token_ids": (7, 9)},
}
TICKS = 20
COPIES = 4  # of the logits, taken in turn: a GPU's caches hold not even one of many rows
AHEAD = 200_000_000  # cycles, about a tenth of a second: the device's wait in which the host gets ahead of it


def main(rows: list[int]) -> None:
    device = torch.device("cuda", 0)
    if not torch.cuda.is_available() or not supported(DTYPE, device):
        sys.exit("this bench compares kernels: it needs a GPU of the Hopper generation or later and cuda-bindings")
    print(f"{torch.cuda.get_device_name(device)}, {VOCAB:,} tokens, {DTYPE}; microseconds a tick, device / host")
    print(f"{'rows':>5} {'':42} {'greedy':>15} {'plain':>15} {'kernel':>15}")
    kernel = CudaSampler(VOCAB, DTYPE, device)
    for count in rows:
        logits = [3 * torch.randn(count, VOCAB, device=device).to(DTYPE) for _ in range(COPIES)]
        greedy = _times(partial(_greedy, logits))
        for name, params in KINDS.items():
            plain = _times(_ticks(Sampler(VOCAB, device), logits, params))
            ours = _times(_ticks(kernel, logits, params))
            print(f"{count:>5} {name:42} {greedy:>15} {plain:>15} {ours:>15}", flush=True)


def _greedy(logits: list[Tensor], number: int) -> Sampled:
    return Sampled(likeliest(logits[number % COPIES]))


def _ticks(sampler: Sampler | CudaSampler, logits: list[Tensor], params: dict[str, Any]) -> Callable[[int], Sampled]:
    """A decode tick of requests that all ask for the same."""
    asked, prompt = SamplingParams(**params), Prompt(list(range(1000, 2000)))
    requests = [Request(i, 0, prompt, asked, stream=i * 0x9E3779B9) for i in range(len(logits[0]))]

    def tick(number: int) -> Sampled:
        return sampler.sample(logits[number % COPIES], requests, [1000 + number] * len(requests))

    return tick


def _times(tick: Callable[[int], Sampled]) -> str:
    """Microseconds of a tick on the device and on the host."""
    kept = [tick(number) for number in range(3)]  # loads kernels, enters penalties, takes memory
    kept[-1].fetch()
    return f"{1e6 * _on_device(tick):.0f} / {1e6 * _on_host(tick):.0f}"


def _on_device(tick: Callable[[int], Sampled]) -> float:
    """Seconds of a tick, one behind the other without waiting for the host."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    kept = [tick(number) for number in range(TICKS)]
    end.record()
    kept[-1].fetch()
    elapsed: float = start.elapsed_time(end)  # milliseconds
    return elapsed / 1e3 / TICKS


def _on_host(tick: Callable[[int], Sampled]) -> float:
    """Seconds to launch a tick, while the one before it is fetched behind it, as the engine does; the median."""
    spent, before = [], tick(0)
    for number in range(TICKS):
        began = perf_counter()
        now = tick(number)
        spent.append(perf_counter() - began)
        before.fetch()
        before = now
    before.fetch()
    return median(spent)


if __name__ == "__main__":
    main([int(rows) for rows in sys.argv[1:]] or list(ROWS))
