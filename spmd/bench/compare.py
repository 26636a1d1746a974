"""Ratios on this machine, in one run: pipeline against one process, against transformers, and each idea on and off.

python -m spmd.bench.compare [rounds] [model=small ...]

Machines are noisy, so every contender runs once a round, round after round, and the ratio is the median of the rounds'
ratios. A process alone gets all cores, the ranks of a pipeline share them. transformers computes in the checkpoint's
dtype, as it does by default, and in float32, which is ours on CPUs without bfloat16.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Contender:
    name: str
    module: str
    ranks: int = 1
    overrides: tuple[str, ...] = ()

    def run(self, overrides: list[str]) -> dict[str, Any]:
        """Run once as a user would; the figures it printed."""
        cores = len(os.sched_getaffinity(0))
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores // self.ranks))}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        command += ["-m", self.module, *overrides, *self.overrides]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(command)}\n{done.stderr}")
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures


PP1 = Contender("pp=1", "spmd.bench")
PP2 = Contender("pp=2", "spmd.bench", 2, ("topology=pp2",))
ASYNC = Contender("pp=2 async_depth=1", "spmd.bench", 2, ("topology=pp2", "scheduler.async_depth=1"))
NO_CAP = Contender("pp=2 decode_cap=false", "spmd.bench", 2, ("topology=pp2", "scheduler.decode_cap=false"))
TRANSFORMERS = Contender("transformers generate", "spmd.bench.reference")
FLOAT32 = Contender("transformers in float32", "spmd.bench.reference", overrides=("model.dtype=float32",))
CONTENDERS = (PP1, PP2, TRANSFORMERS, FLOAT32, ASYNC, NO_CAP)
PAIRS = (
    *((PP2, PP1), (PP2, TRANSFORMERS), (PP1, TRANSFORMERS)),
    *((PP2, FLOAT32), (PP1, FLOAT32), (ASYNC, PP2), (PP2, NO_CAP)),
)


def compare(rounds: int, overrides: list[str]) -> None:
    """Run every contender `rounds` times in turn and print medians and ratios."""
    speed: dict[Contender, list[float]] = {contender: [] for contender in CONTENDERS}
    busy: dict[Contender, list[list[float]]] = {contender: [] for contender in CONTENDERS}
    for number in range(rounds):
        for contender in CONTENDERS:
            figures = contender.run(overrides)
            speed[contender].append(figures["output_throughput"])
            busy[contender].append(figures.get("stage_busy_percent", []))
            print(f"round {number + 1}: {contender.name}: {speed[contender][-1]:.1f} tok/s", file=sys.stderr)
    print(f"{'':24} {'output tok/s':>12}  stage busy %")
    for contender in CONTENDERS:
        stages = [f"{median(stage):.1f}" for stage in zip(*busy[contender], strict=True)]
        print(f"{contender.name:24} {median(speed[contender]):12.1f}  {' '.join(stages)}")
    for ours, other in PAIRS:
        ratios = [a / b for a, b in zip(speed[ours], speed[other], strict=True)]
        print(f"{ours.name} / {other.name}: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    words = sys.argv[1:]
    rounds = int(words.pop(0)) if words and words[0].isdigit() else 3
    compare(rounds, words or ["model=small", "workload=cpu", "scheduler.max_num_seqs=16"])
