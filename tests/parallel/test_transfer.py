from collections.abc import Sequence

import pytest
import torch

from spmd.parallel.transfer import on_host

Numbers = Sequence[float | Sequence[float]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("values", [[], [7], [3, True, False], [(1, 2, 3), (4, 5, 6)], [2**31 - 1, -1]])
def test_whole_numbers_are_what_torch_makes_of_them(values: Numbers, dtype: torch.dtype) -> None:
    expected = torch.tensor(values, dtype=dtype)
    assert on_host(values, dtype).dtype == dtype
    assert torch.equal(on_host(values, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("values", [[], [0.1], [[0.1, 0.7], [1e-6, 3.0]], [(1, 2, float("-inf")), (2**40, 0, 0.3)]])
def test_fractions_are_what_torch_makes_of_them(values: Numbers, dtype: torch.dtype) -> None:
    assert torch.equal(on_host(values, dtype), torch.tensor(values, dtype=dtype))
