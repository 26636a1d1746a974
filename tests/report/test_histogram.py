from collections.abc import Iterable

import numpy as np
import pytest

from spmd.report.histogram import Histogram


def filled(seconds: Iterable[float]) -> Histogram:
    histogram = Histogram()
    for value in seconds:
        histogram.add(float(value))
    return histogram


@pytest.mark.parametrize("scale", [1e-3, 1e-1, 1e2])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0])
def test_percentiles_are_within_one_percent_of_numpys(scale: float, sigma: float) -> None:
    data = np.random.default_rng(0).lognormal(np.log(scale), sigma, 20_000)
    histogram = filled(data)
    for percent in (1, 25, 50, 90, 99, 99.9):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(data, percent), rel=0.01)
    assert histogram.mean == pytest.approx(data.mean(), rel=1e-4)


@pytest.mark.parametrize("data", [[0.5], [0.1, 0.4], [3.0, 1.0, 2.0]])
def test_a_few_values_are_interpolated_as_numpy_does(data: list[float]) -> None:
    for percent in (0, 50, 75, 99, 100):
        assert filled(data).percentile(percent) == pytest.approx(np.percentile(data, percent), rel=0.01)


def test_merging_equals_counting_in_one_place() -> None:
    data = np.random.default_rng(1).lognormal(-3, 2, 5_000)
    merged = filled(data[:1_234])
    merged.merge(filled(data[1_234:]))
    assert merged == filled(data)


def test_a_repeated_duration_counts_as_often() -> None:
    bulk = filled([0.5])
    bulk.add(0.3, count=4)
    assert bulk == filled([0.5, 0.3, 0.3, 0.3, 0.3])


def test_empty_is_zero_and_durations_of_nothing_are_counted() -> None:
    assert Histogram().mean == Histogram().percentile(99) == 0.0
    assert filled([0.0, -1e-9]).count == 2


def test_memory_is_bounded() -> None:
    histogram = filled(np.geomspace(1e-9, 1e6, 50_000))
    assert len(histogram.bins) < 9_000
