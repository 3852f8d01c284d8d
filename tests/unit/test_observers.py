"""Observers without histograms: numbers worked out by hand, options, and what holds for any numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slimbridge.errors import SlimbridgeError
from slimbridge.parity import tolerance
from slimbridge.plan.registries import OBSERVERS, Observer, Scheme
from slimbridge.ports import Array, Statistics
from slimbridge.quantize.grid import grid_of
from slimbridge.quantize.histogram import statistics_of

NAMES = ("absmax", "avg", "emd", "histogram", "kl", "minmax", "moving_average", "mse", "percentile")
WITH_HISTOGRAM = ("emd", "histogram", "kl", "mse", "percentile")
SIZES = st.floats(2.0**-60, 2.0**20, width=32)
FLOATS = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda value: -value))
BATCHES = st.lists(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=3, max_side=6), elements=FLOATS),
    min_size=1,
    max_size=4,
)
SCHEMES = st.builds(Scheme, bits=st.integers(2, 8), symmetric=st.booleans())
OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("moving_average", {"rate": 1.0}, "below 1"),
    ("moving_average", {"rate": -0.1}, "below 1"),
    ("moving_average", {"start": "zero"}, "'paddle'"),
    ("histogram", {"hist_percent": 0.5}, "above 0.5"),
    ("histogram", {"hist_percent": 99.9}, "above 0.5"),
    ("percentile", {"percentile": 0}, "above 0"),
    ("percentile", {"percentile": 101}, "to 100"),
]


def observe(name: str, batches: Any, **options: Any) -> Observer:
    observer = OBSERVERS.get(name)(**options)
    for batch in batches:
        observer.update(statistics_of(np.asarray(batch), observer.needs_histogram))
    return observer


def close(found: tuple[float, float], expected: tuple[float, float]) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance("operation_float64").value)


FIRST, SECOND = [[1.0, -4.0], [2.0, 0.5]], [[-1.0, 3.0], [0.0, 6.0]]


def test_they_are_all_there() -> None:
    assert OBSERVERS.names() == NAMES
    assert tuple(name for name in NAMES if OBSERVERS.get(name)().needs_histogram) == WITH_HISTOGRAM


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("minmax", (-4.0, 6.0)),
        ("absmax", (-6.0, 6.0)),
        ("avg", (-3.75, 3.75)),  # ((4 + 2) / 2 + (3 + 6) / 2) / 2
        ("moving_average", (0.9 * -4 + 0.1 * -1, 0.9 * 2 + 0.1 * 6)),
    ],
)
def test_two_batches(name: str, expected: tuple[float, float]) -> None:
    close(observe(name, [FIRST, SECOND]).limits(Scheme()), expected)


@pytest.mark.parametrize("name", ["absmax", "avg", *WITH_HISTOGRAM])
def test_a_range_that_has_no_negative_value_starts_at_zero(name: str) -> None:
    """So that a symmetric grid of activations is unsigned."""
    observer = observe(name, [np.abs(FIRST), np.abs(SECOND)])
    assert observer.limits(Scheme())[0] == 0
    assert grid_of(*observer.limits(Scheme()), Scheme()).low == 0


def test_moving_average_as_paddle_starts_it() -> None:
    """state and accum start at 1: (0.9 + 4) / (0.9 + 1), then (0.9 * 4.9 + 6) / (0.9 * 1.9 + 1)."""
    close(observe("moving_average", [FIRST], start="paddle").limits(Scheme()), (-4.9 / 1.9, 4.9 / 1.9))
    second = (0.9 * 4.9 + 6) / (0.9 * 1.9 + 1)
    observer = observe("moving_average", [FIRST, SECOND], start="paddle")
    close(observer.limits(Scheme()), (-second, second))
    with pytest.raises(SlimbridgeError, match="symmetric"):
        observer.limits(Scheme(symmetric=False))


def test_a_rate_of_zero_keeps_the_last_batch() -> None:
    close(observe("moving_average", [FIRST, SECOND], rate=0.0).limits(Scheme()), (-1.0, 6.0))


@pytest.mark.parametrize("name", NAMES)
def test_before_any_update_and_for_zeros(name: str) -> None:
    assert observe(name, []).limits(Scheme()) == (0, 0)
    assert observe(name, [np.zeros((2, 3)), np.zeros((1, 3))]).limits(Scheme()) == (0, 0)


def test_paddle_start_before_any_update() -> None:
    assert observe("moving_average", [], start="paddle").limits(Scheme()) == (0, 0)


@pytest.mark.parametrize(("name", "options", "message"), OPTIONS)
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimbridgeError, match=f"observer '{name}'.*{message}.*found"):
        OBSERVERS.get(name)(**options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    with pytest.raises(SlimbridgeError, match="not finite"):
        observe(name, [[[1.0, bad]]])


@pytest.mark.parametrize("name", WITH_HISTOGRAM)
def test_a_missing_histogram_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="histogram"):
        OBSERVERS.get(name)().update(Statistics(0.0, 1.0, 1.0))


@given(BATCHES, SCHEMES, st.sampled_from(NAMES))
def test_limits_are_in_order_and_within_the_values(batches: list[Array], scheme: Scheme, name: str) -> None:
    observer = observe(name, batches)
    low, high = observer.limits(scheme)
    largest = max(float(np.abs(batch).max()) for batch in batches)
    assert -largest <= low <= high <= largest
    grid_of(low, high, scheme)


@given(BATCHES, SCHEMES, st.sampled_from(["minmax", "absmax", *WITH_HISTOGRAM]))
def test_the_order_of_batches_does_not_matter(batches: list[Array], scheme: Scheme, name: str) -> None:
    forward, backward = observe(name, batches), observe(name, batches[::-1])
    assert forward.limits(scheme) == backward.limits(scheme)


@given(BATCHES, SCHEMES, st.sampled_from(NAMES), st.integers(-8, 8))
def test_limits_follow_the_unit(batches: list[Array], scheme: Scheme, name: str, power: int) -> None:
    """Values in another unit, a power of two, give the same limits in that unit: every operation scales exactly."""
    unit = 2.0**power
    low, high = observe(name, batches).limits(scheme)
    assert observe(name, [batch * unit for batch in batches]).limits(scheme) == (low * unit, high * unit)
