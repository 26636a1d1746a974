"""The table of docs/performance.md on one or two GPUs: every workload once, each beside vLLM's figure.

python -m tests.gpu_table 1|2 [part of a name ...]

A row takes 25 to 120 seconds, most of them on start-up; words after the number of GPUs choose rows whose names hold one
of them. vLLM's figures are those of the page: 0.33.0, the same work, on H200s.
"""

import subprocess
import sys
from dataclasses import dataclass
from time import monotonic

from spmd.bench.compare import Contender
from spmd.trace.account import PARTS

COMMON = ("scheduler.prefix_caching=false", "progress=false")
EIGHT_B = ("model=qwen3_8b", "model.max_model_len=2048")
LONG = (*EIGHT_B, "workload=long_output", "scheduler.max_num_seqs=128")
SHORT = (*LONG, "workload.output_len=[300,300]")
FEW = (*EIGHT_B, "workload=short_output")
CONTEXT = ("model=qwen3_8b", "model.max_model_len=8192", "workload=long_context", "scheduler.max_num_seqs=64")
MANY = (*EIGHT_B, "workload=many_seats", "scheduler.max_num_seqs=512")
RAGGED = ("model=qwen3_8b", "model.max_model_len=4096", "workload=ragged_long")
SMALL = ("model=qwen3_06b", "model.max_model_len=2048", "workload=ragged", "scheduler.max_num_seqs=256")
RAGGED_EXPERTS = ("workload=ragged_experts", "model.max_model_len=9216")
EXPERTS = ("model=qwen3_30b_a3b", "topology.dp=2", "topology.ep=true", "scheduler.max_num_seqs=64")
DEFAULTS = ("sampling.temperature=0.6", "sampling.top_p=0.95", "sampling.top_k=20")
PENALISED = ("sampling.temperature=0.7", "sampling.top_p=0.8", "sampling.top_k=20", "sampling.repetition_penalty=1.05")


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    name: str
    overrides: tuple[str, ...]
    vllm: int | None = None  # output tokens per second


ONE = (
    Line("long_output", LONG, 7896),
    Line("long_output, 300 out", SHORT, 6163),
    Line("… temperature 1", (*SHORT, "sampling.temperature=1"), 6123),
    Line("… Qwen3's defaults", (*SHORT, *DEFAULTS), 6047),
    Line("… temperature 1, top_p 0.95", (*SHORT, "sampling.temperature=1", "sampling.top_p=0.95"), 3210),
    Line("… temperature 1, logprobs 0", (*SHORT, "sampling.temperature=1", "sampling.logprobs=0"), 5948),
    Line("… repetition penalty", (*SHORT, *PENALISED), 6003),
    Line("short_output, 8 seats", (*FEW, "scheduler.max_num_seqs=8"), 1251),
    Line("long_context", CONTEXT, 494),
    Line("many_seats", MANY, 13931),
    Line("ragged, Qwen3-0.6B", SMALL, 22257),
    Line("ragged_long, 128 seats", (*RAGGED, "scheduler.max_num_seqs=128")),
    Line("ragged_long, 256 seats", (*RAGGED, "scheduler.max_num_seqs=256")),
)
PP2 = ("topology=pp2",)
TWO = (
    Line("long_output, pp=2", (*LONG, *PP2), 10846),
    Line("long_output, 300 out, pp=2", (*SHORT, *PP2), 9017),
    Line("… Qwen3's defaults, pp=2", (*SHORT, *DEFAULTS, *PP2), 8618),
    Line("long_output, tp=2", (*LONG, "topology=tp2"), 12815),
    Line("short_output, 16 seats, pp=2", (*FEW, "scheduler.max_num_seqs=16", *PP2), 2054),
    Line("long_context, pp=2", (*CONTEXT, *PP2), 858),
    Line("ragged_long, 128 seats, pp=2", (*RAGGED, "scheduler.max_num_seqs=128", *PP2)),
    Line("ragged_long, 256 seats, pp=2", (*RAGGED, "scheduler.max_num_seqs=256", *PP2)),
    Line("experts, dp=2", (*EXPERTS, "workload=long_prompt", "model.max_model_len=5120"), 5988),
    Line("ragged_experts, dp=2", (*EXPERTS, *RAGGED_EXPERTS)),
    Line("ragged_experts, dp=2, fcfs", (*EXPERTS, *RAGGED_EXPERTS, "scheduler.policy=fcfs")),
)


def show(line: Line, gpus: int) -> None:
    """Run one row and print it: speed, share of the floor, ratio to vLLM, and where each stage's time went."""
    began = monotonic()
    try:
        figures = Contender(line.name, "spmd.bench", gpus, (*COMMON, *line.overrides)).run([])
    except (RuntimeError, subprocess.SubprocessError) as error:
        print(f"{line.name:32} failed: {str(error).splitlines()[-1]}", flush=True)
        return
    speed, floor = figures["output_throughput"], figures["floor_percent"]
    ratio = f"{speed / line.vllm:5.2f}" if line.vllm else ""
    reached = f"{floor:5.1f}" if floor else ""
    print(f"{line.name:32} {speed:9,.0f} {reached:>6} {line.vllm or '':>7} {ratio:>6} {monotonic() - began:5.0f} s")
    for number, parts in enumerate(figures["stage_time_percent"]):
        print(f"    stage {number}: " + ", ".join(f"{part} {parts[part]:.1f}" for part in PARTS if parts[part] >= 0.05))
    sys.stdout.flush()


def main(gpus: int, words: list[str]) -> None:
    print(f"{'':32} {'tok/s':>9} {'floor%':>6} {'vLLM':>7} {'ratio':>6}")
    for line in ONE if gpus == 1 else TWO:
        if not words or any(word in line.name for word in words):
            show(line, gpus)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("1", "2"):
        sys.exit("error: python -m tests.gpu_table 1|2 [part of a name ...]")
    main(int(sys.argv[1]), sys.argv[2:])
