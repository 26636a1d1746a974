"""Lengths of synthetic rows."""

from statistics import median

from spmd.bench.workload import lengths
from spmd.config import WorkloadConfig


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
