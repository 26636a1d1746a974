"""Synthetic rows: random token ids and lengths from a fixed seed, equal on every rank and for every engine compared."""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

from spmd.api.endpoints import COMPLETIONS
from spmd.api.rows import BadRow, Job
from spmd.api.source import SKIPPED, Skipped
from spmd.config import WorkloadConfig
from spmd.schedule.longest_first import longest_first
from spmd.schedule.prompt import Prompt
from spmd.schedule.request import Request, SamplingParams


def prompts(workload: WorkloadConfig, vocab_size: int) -> Iterator[tuple[list[int], int]]:
    """Token ids and output length of each prompt."""
    rng = random.Random(workload.seed)
    for _ in range(workload.num_prompts):
        length, output = rng.randint(*workload.input_len), _output(workload, rng)
        yield [rng.randrange(vocab_size) for _ in range(length)], output


def _output(workload: WorkloadConfig, rng: random.Random) -> int:
    least, most = workload.output_len
    if not workload.output_sigma:
        return rng.randint(least, most)
    drawn = rng.lognormvariate(math.log(least * most) / 2, workload.output_sigma)
    return min(most, max(least, round(drawn)))


def lengths(workload: WorkloadConfig, vocab_size: int) -> list[tuple[int, int]]:
    """Tokens of prompt and output, row by row, of the whole workload."""
    return [(len(prompt), output) for prompt, output in prompts(workload, vocab_size)]


class Workload:
    """The rows, of fixed lengths, as a `Source`."""

    waited = 0.0

    def __init__(
        self, workload: WorkloadConfig, vocab_size: int, longest: int, params: SamplingParams, seats: int = 0
    ) -> None:
        """A request can have `longest` tokens. All ask for `params`, but each for as many tokens as its row has.

        `seats`: see `longest_first`.

        Raises:
            ValueError: a row may have more.
        """
        w = workload
        needed = w.input_len[1] + w.output_len[1]
        if needed > longest:
            raise ValueError(
                f"workload.input_len={w.input_len} and workload.output_len={w.output_len} need {needed} tokens, "
                f"a request can have {longest} (model.max_model_len, scheduler.num_blocks)"
            )
        drawn = list(enumerate(prompts(w, vocab_size)))  # drawing them is not what is measured
        self._rows = longest_first(drawn, lambda row: row[1][1], lambda row: 4 * len(row[1][0]), seats)
        self._params = params

    def next_row(self, own: bool) -> Job | BadRow | Skipped | None:
        if (drawn := next(self._rows, None)) is None:
            return None
        if not own:
            return SKIPPED
        index, (tokens, output) = drawn
        params, prompt = replace(self._params, max_tokens=output), Prompt(tokens)
        return Job(index, f"row-{index}", COMPLETIONS, [Request(index, 0, prompt, params, stream=index)], [prompt])
