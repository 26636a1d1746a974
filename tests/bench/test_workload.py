"""Lengths of synthetic rows."""

from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch

from spmd.api.rows import Job
from spmd.bench.runs import sampling_of_rows
from spmd.bench.workload import Workload, lengths
from spmd.config import Config, ModelConfig, SamplingConfig, WorkloadConfig
from spmd.schedule.request import SamplingParams
from spmd.settings import read_model, resolve


def test_uniform_lengths_fill_their_ranges() -> None:
    drawn = lengths(WorkloadConfig(num_prompts=400, input_len=[5, 8], output_len=[1, 4]), 100)
    assert {prompt for prompt, _ in drawn} == {5, 6, 7, 8}
    assert {output for _, output in drawn} == {1, 2, 3, 4}


def test_lognormal_outputs_have_a_heavy_tail_within_their_range() -> None:
    workload = WorkloadConfig(num_prompts=2000, input_len=[1, 1], output_len=[1, 900], output_sigma=1.5)
    outputs = [output for _, output in lengths(workload, 100)]
    assert 27 <= median(outputs) <= 33
    assert min(outputs) == 1 and max(outputs) == 900
    assert sum(outputs) / len(outputs) > 2 * median(outputs)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (SamplingConfig(top_p=0.5), SamplingParams(temperature=0.0, ignore_eos=True)),
        (
            SamplingConfig(temperature=0.6, top_p=0.95, top_k=20, logprobs=0, stop_token_ids=[3]),
            SamplingParams(temperature=0.6, top_p=0.95, top_k=20, logprobs=0, ignore_eos=True),
        ),
    ],
)
def test_rows_are_greedy_unless_a_temperature_is_set(sampling: SamplingConfig, expected: SamplingParams) -> None:
    shape = Path(__file__).parents[2] / "conf" / "shapes" / "tiny"
    config = Config(model=ModelConfig(path=str(shape), load_format="dummy"), sampling=sampling, device="cpu")
    params = sampling_of_rows(resolve(config, read_model(config), torch.device("cpu")))
    rows = Workload(WorkloadConfig(num_prompts=5, output_len=[1, 9]), 100, 500, params)
    jobs = [rows.next_row(own=True) for _ in range(5)]
    requests = [job.requests[0] for job in jobs if isinstance(job, Job)]
    assert len({request.stream for request in requests}) == 5
    for request in requests:
        assert request.params == replace(expected, max_tokens=request.params.max_tokens)
    drawn = lengths(WorkloadConfig(num_prompts=5, output_len=[1, 9]), 100)
    assert [request.params.max_tokens for request in requests] == [output for _, output in drawn]
