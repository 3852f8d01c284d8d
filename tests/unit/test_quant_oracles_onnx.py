"""Calibration against ONNX Runtime's own."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
from onnxruntime.quantization.calibrate import HistogramCollector

from slimbridge.parity import tolerance
from slimbridge.plan.registries import OBSERVERS, Scheme
from slimbridge.ports import Array
from slimbridge.quantize.histogram import bin_width, histogram_of, statistics_of

RNG = np.random.default_rng(23)
NORMAL = RNG.standard_normal((16, 8000)).astype(np.float32)
LAPLACE = RNG.laplace(size=(16, 8000)).astype(np.float32)
BINS = 2049


def theirs(method: str, values: Array, symmetric: bool, percentile: float = 99.99, levels: int = 256) -> list[float]:
    collector = HistogramCollector(method, symmetric, BINS, levels, percentile, "same")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        collector.collect({"tensor": [values]})
        found = collector.compute_collection_result()["tensor"]
    return [float(end) for end in found[:2]]


def ours(name: str, values: Array, scheme: Scheme, **options: float) -> tuple[float, float]:
    observer = OBSERVERS.get(name)(**options)
    observer.update(statistics_of(values, histogram=True))
    return observer.limits(scheme)


@pytest.mark.parametrize("values", [NORMAL, LAPLACE])
@pytest.mark.parametrize("percentile", [99.99, 99.9, 99.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile(values: Array, percentile: float, symmetric: bool) -> None:
    """It gives the lower end of the bin that the percentile falls into, we the outer end of ours."""
    low, high = theirs("percentile", values, symmetric, percentile)
    found = ours("percentile", values, Scheme(symmetric=symmetric), percentile=percentile)
    span = np.abs(values).max() if symmetric else np.ptp(values)
    bound = 2 * (float(span) / BINS + bin_width(histogram_of(values)))
    assert abs(found[1] - high) <= bound
    assert abs(found[0] - (-high if symmetric else low)) <= bound


@pytest.mark.parametrize("values", [NORMAL, LAPLACE])
def test_kl_is_near_to_the_entropy_of_as_many_levels(values: Array) -> None:
    """256 levels for both signs together, as 128 for magnitudes."""
    threshold = ours("kl", values, Scheme())[1]
    assert abs(threshold / theirs("entropy", values, True)[1] - 1) < tolerance("calibrated_range").value


def test_a_spike_at_zero_does_not_mislead_kl() -> None:
    """It counts the zeros of a ReLU as values to be spread over a level, and cuts a third of the range off."""
    values = np.maximum(NORMAL, 0)
    top = float(values.max())
    assert theirs("entropy", values, True)[1] < 0.75 * top < ours("kl", values, Scheme())[1]
