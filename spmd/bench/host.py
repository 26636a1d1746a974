"""The host's share of one decode tick, without a forward: commit, schedule, build the inputs.

python -m spmd.bench.host [running] [tokens] [pp]

On a fast GPU a whole tick takes a few milliseconds, so this must be a fraction of one.
"""

import sys
from collections import deque
from statistics import median, quantiles
from time import perf_counter

import torch

from spmd.model.inputs import InputBuilder
from spmd.schedule.blocks import BlockPool
from spmd.schedule.plan import Plan
from spmd.schedule.request import Request, SamplingParams
from spmd.schedule.scheduler import Limits, Scheduler

BLOCK_SIZE = 16
TICKS = 400


def measure(running: int, tokens: int, pp: int) -> list[float]:
    """Seconds of each of TICKS decode ticks with `running` requests that have about `tokens` tokens each."""
    longest = tokens + TICKS + 64
    blocks = running * (longest // BLOCK_SIZE + 1) + 1
    limits = Limits(running, running * tokens, running // pp, slots=pp)
    scheduler = Scheduler(limits, BlockPool(blocks, BLOCK_SIZE, caching=True))
    builder = InputBuilder(running, longest // BLOCK_SIZE + 1, BLOCK_SIZE, torch.device("cpu"))
    for index in range(running):
        prompt = [(index * 7919 + place) % 50_000 for place in range(tokens + index % BLOCK_SIZE)]
        scheduler.add(Request(index, 0, prompt, SamplingParams(max_tokens=longest)))
    ring: deque[Plan] = deque()
    seconds = []
    for tick in range(TICKS):
        started = perf_counter()
        if len(ring) == pp:
            plan = ring.popleft()
            scheduler.commit(plan, [1] * len(plan.sampled), [False] * len(plan.sampled))
        plan = scheduler.schedule(tick)
        builder.build(plan)
        ring.append(plan)
        if plan.num_decodes == running // pp:
            seconds.append(perf_counter() - started)
    return seconds


if __name__ == "__main__":
    torch.set_num_threads(1)
    running, tokens, pp = map(int, (sys.argv[1:] + ["128", "1500", "2"][len(sys.argv) - 1 :])[:3])
    milliseconds = [1e3 * s for s in measure(running, tokens, pp)]
    p99 = quantiles(milliseconds, n=100)[98]
    print(f"{running} running, {tokens} tokens each, pp={pp}: {len(milliseconds)} decode ticks of {running // pp} rows")
    print(f"host time of a tick: median {median(milliseconds):.3f} ms, p99 {p99:.3f} ms")
