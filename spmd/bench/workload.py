"""Synthetic rows: random token ids and lengths from a fixed seed, equal on every rank and for every engine compared."""

import random
from collections.abc import Iterator

from spmd.config import WorkloadConfig
from spmd.io.rows import Job
from spmd.schedule.request import Request, SamplingParams
from spmd.topology import Topology


def prompts(workload: WorkloadConfig, num_prompts: int, vocab_size: int) -> Iterator[tuple[list[int], int]]:
    """Token ids and output length of each prompt."""
    rng = random.Random(workload.seed)
    for _ in range(num_prompts):
        length, output = rng.randint(*workload.input_len), rng.randint(*workload.output_len)
        yield [rng.randrange(vocab_size) for _ in range(length)], output


def lengths(workload: WorkloadConfig, vocab_size: int) -> list[tuple[int, int]]:
    """Tokens of prompt and output, row by row, of the whole workload."""
    return [(len(prompt), output) for prompt, output in prompts(workload, workload.num_prompts, vocab_size)]


def jobs(workload: WorkloadConfig, vocab_size: int, longest: int, topology: Topology) -> Iterator[Job]:
    """The greedy, fixed-length rows of this replica.

    Raises:
        ValueError: a row may have more than `longest` tokens.
    """
    w = workload
    needed = w.input_len[1] + w.output_len[1]
    if needed > longest:
        raise ValueError(
            f"workload.input_len={w.input_len} and workload.output_len={w.output_len} need {needed} tokens, a request "
            f"can have {longest} (model.max_model_len, scheduler.num_blocks)"
        )
    return _jobs(w, vocab_size, topology)


def _jobs(workload: WorkloadConfig, vocab_size: int, topology: Topology) -> Iterator[Job]:
    for index, (tokens, output) in enumerate(prompts(workload, workload.num_prompts, vocab_size)):
        if index % topology.dp == topology.dp_rank:
            params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
            yield Job(index, f"row-{index}", False, [Request(index, 0, tokens, params)], tokens)
