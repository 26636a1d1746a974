"""Every row of the table of GPUs is a job that would run there."""

import subprocess
import sys

import pytest
import torch

from spmd.bench.workload import lengths
from spmd.config_checks import check
from spmd.runtime.compose import compose
from spmd.settings import read_model, resolve
from tests.gpu_table import COMMON, ONE, TWO, Line


@pytest.mark.parametrize(("line", "gpus"), [(line, 1) for line in ONE] + [(line, 2) for line in TWO])
def test_its_configuration_is_one_for_so_many_gpus_and_its_rows_fit(
    line: Line, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *COMMON, *line.overrides])
    config = compose(quiet=True)
    check(config, gpus)
    settings = resolve(config, read_model(config), torch.device("cuda"))
    assert settings.model.attention_backend == "flashinfer"
    rows = lengths(config.workload, settings.arch.vocab_size)
    assert max(sum(row) for row in rows) <= settings.model.max_model_len


def test_without_a_number_of_gpus_it_says_what_it_wants() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.gpu_table"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "error: python -m tests.gpu_table 1|2 [part of a name ...]\n"
