"""What the balance between replicas brings, without a model, and what the exchange of loads costs.

python -m spmd.bench.balance [dp] [rows]

Real engines run in one process (`spmd.bench.simulation`); output lengths are lognormal. Ticks count as equally
long, so the time of prompts, which a gate is for, isn't in the figures: how often replicas prefill apart is. The cost
is that of the real exchange between processes of this machine.
"""

import math
import random
import sys
from collections.abc import Iterator
from functools import partial
from statistics import mean
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spmd.api.endpoints import COMPLETIONS
from spmd.api.rows import Job
from spmd.bench.simulation import Fleet
from spmd.parallel.groups import disconnect
from spmd.parallel.load import LoadExchange
from spmd.schedule.balance import Load, Rules
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams

PROMPT, MEDIAN, SIGMA, LONGEST = 64, 60, 1.5, 2000  # tokens of a prompt, of outputs, and their spread
SEATS, ROWS, SEEDS = 32, 4000, 4  # seats of a replica, rows of a list, lists
EXCHANGES = 2000


def lognormal_jobs(rows: int, sigma: float = SIGMA, seed: int = 0) -> list[Job]:
    """Prompts of PROMPT tokens, outputs of lognormal lengths, in random order."""
    rng = random.Random(seed)
    lengths = [min(LONGEST, max(1, round(rng.lognormvariate(math.log(MEDIAN), sigma)))) for _ in range(rows)]
    return [make_job(index, PROMPT, length) for index, length in enumerate(lengths)]


def make_job(index: int, prompt: int, output: int) -> Job:
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    shared = Prompt([index % 1000] * prompt)
    return Job(index, str(index), COMPLETIONS, [Request(index, 0, shared, params)], [shared])


def balance_rows(dp: int, rows: int) -> Iterator[str]:
    """A line for each way to share and each gate: means over SEEDS lists, and the longest idle tail."""
    yield f"{'share':8} {'gate':10} {'lag':>3} {'ticks':>7} {'idle tail':>10} {'longest':>8} {'frozen':>7} {'mixed':>7}"
    for share, gate, lag in [
        *(("static", "off", 4), ("dynamic", "off", 0), ("dynamic", "off", 4), ("dynamic", "off", 16)),
        *(("dynamic", "saturated", 4), ("dynamic", "near", 4), ("dynamic", "interval", 4)),
    ]:
        rules = Rules(SEATS, dp=dp, share=share, gate=gate, lag=lag)
        fleets = [Fleet(rules, partial(lognormal_jobs, rows, seed=seed)).run() for seed in range(SEEDS)]
        ticks = mean(max(fleet.busy) for fleet in fleets)
        tail, longest = (f"{100 * of(fleet.idle_tail for fleet in fleets):.2f} %" for of in (mean, max))
        frozen = mean(sum(balance.frozen_ticks for balance in fleet.balances) for fleet in fleets)
        mixed = mean(fleet.balances[0].mixed_ticks for fleet in fleets)
        yield f"{share:8} {gate:10} {lag:3} {ticks:7,.0f} {tail:>10} {longest:>8} {frozen:7,.0f} {mixed:7,.0f}"


def time_exchange(rank: int, dp: int, port: int) -> None:
    """Print, on rank 0, the mean time of one exchange."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=dp)
    found = []
    for lag in (0, 4):
        assert dist.group.WORLD is not None
        wire, load = LoadExchange(dist.group.WORLD, dp, lag), Load(*range(len(Load._fields)))
        started = perf_counter()
        for _ in range(EXCHANGES):
            wire.launch(load)
            wire.receive()
        wire.drain()
        found.append(f"lag {lag} {1e6 * (perf_counter() - started) / EXCHANGES:7.0f} us")
    if rank == 0:
        print(f"dp={dp}: {', '.join(found)}", flush=True)
    disconnect()


def main(dp: int = 4, rows: int = ROWS) -> None:
    lists = f"{SEEDS} lists of {rows:,} rows, outputs lognormal (median {MEDIAN}, sigma {SIGMA})"
    print(f"dp={dp}, {SEATS} seats a replica, {lists}")
    for line in balance_rows(dp, rows):
        print(line, flush=True)
    print("one exchange, launched and received, nothing else to do:")
    for size in (2, 4, 8):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(time_exchange, (size, store.port), size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*map(int, sys.argv[1:]))
