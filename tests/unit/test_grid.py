"""The integer grid against formulas written out by hand, and what holds for any numbers."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slimbridge.decisions import QuantParams
from slimbridge.errors import SlimbridgeError
from slimbridge.plan.registries import Scheme
from slimbridge.ports import Array
from slimbridge.quantize.formulas import HOST, Constants, asymmetric, symmetric
from slimbridge.quantize.grid import grid_of, limits_of, step_array, to_integers, to_reals, zero_point_array

Definition = Literal["own", "paddle", "torch"]
EPS = np.finfo(np.float32).eps
SIZES = st.floats(2.0**-100, 2.0**20, width=32)
FLOATS = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda value: -value))
SCHEMES = st.builds(Scheme, bits=st.integers(2, 8), symmetric=st.booleans(), weight=st.booleans())


def f32(value: float) -> float:
    return float(np.float32(value))


# (limits, scheme) -> (step, zero point, low, high)
CASES: list[tuple[tuple[float, float], Scheme, tuple[float, int, int, int]]] = [
    ((-0.3, 0.2), Scheme(weight=True), (0.3 / 127, 0, -127, 127)),
    ((0.1, 0.2), Scheme(weight=True), (0.2 / 127, 0, -127, 127)),
    ((-0.3, 0.2), Scheme(bits=4, weight=True), (0.3 / 7, 0, -7, 7)),
    ((-0.3, 0.2), Scheme(bits=2, weight=True), (0.3, 0, -1, 1)),
    ((-0.3, 0.2), Scheme(), (0.3 / 127, 0, -128, 127)),
    ((0.0, 6.0), Scheme(), (6 / 255, 0, 0, 255)),
    ((1.0, 6.0), Scheme(bits=5), (6 / 31, 0, 0, 31)),
    ((-2.0, -1.0), Scheme(), (2 / 127, 0, -128, 127)),
    ((-1.0, 4.1), Scheme(symmetric=False), (5.1 / 255, 50, 0, 255)),
    ((-1.0, 4.1), Scheme(symmetric=False, weight=True), (5.1 / 255, -78, -128, 127)),
    ((1.0, 2.0), Scheme(symmetric=False), (2 / 255, 0, 0, 255)),
    ((-2.0, -1.0), Scheme(symmetric=False, bits=4), (2 / 15, 15, 0, 15)),
    ((0.0, 0.0), Scheme(), (1.0, 0, 0, 255)),
    ((0.0, 0.0), Scheme(symmetric=False, weight=True), (1.0, -128, -128, 127)),
    ((0.0, 1e-60), Scheme(weight=True), (1.0, 0, -127, 127)),
    ((-0.3, 0.2), Scheme(definition="paddle"), (0.3 / 127, 0, -127, 127)),
    ((0.0, 6.0), Scheme(definition="paddle"), (6 / 127, 0, -127, 127)),
    ((-0.3, 0.2), Scheme(definition="paddle", weight=True, bits=4), (0.3 / 7, 0, -7, 7)),
    ((-0.5, 0.25), Scheme(definition="torch", weight=True), (0.5 / 127.5, 0, -128, 127)),
    ((-0.5, 0.25), Scheme(definition="torch"), (0.5 / 127.5, 128, 0, 255)),
    ((-0.5, 0.25), Scheme(definition="torch", bits=4), (0.5 / 7.5, 7, 0, 15)),
    ((0.0, 0.0), Scheme(definition="torch", weight=True), (float(EPS), 0, -128, 127)),
]


@pytest.mark.parametrize(("limits", "scheme", "expected"), CASES)
def test_grids(limits: tuple[float, float], scheme: Scheme, expected: tuple[float, int, int, int]) -> None:
    grid = grid_of(*limits, scheme)
    assert (grid.step, grid.zero_point, grid.low, grid.high) == (
        (f32(expected[0]),),
        (expected[1],),
        expected[2],
        expected[3],
    )
    assert (grid.axis, grid.group) == (None, None)
    assert grid.rounding == ("away" if scheme.definition == "paddle" else "even")


def test_a_zero_point_is_rounded_half_to_even() -> None:
    """Steps of 1: the lowest value is 10.5 or 11.5 steps below 0."""
    low = np.array([-10.5, -11.5])
    grid = grid_of(low, low + 255, Scheme(symmetric=False), axis=0)
    assert grid.step == (1.0, 1.0)
    assert grid.zero_point == (10, 12)


@pytest.mark.parametrize("bits", [1, 0, 9, -8])
def test_word_lengths_outside_two_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"2\.\.8"):
        grid_of(-1, 1, Scheme(bits=bits))


@pytest.mark.parametrize("limits", [(np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0), (1.0, -1.0)])
def test_limits_that_make_no_sense_are_refused(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        grid_of(*limits, Scheme())


@pytest.mark.parametrize("definition", ["own", "paddle", "torch"])
def test_limits_beyond_float32_are_refused(definition: Definition) -> None:
    with pytest.raises(ValueError, match="float32"):
        grid_of(0, 1e300, Scheme(definition=definition))


def test_paddle_has_no_asymmetric_grid() -> None:
    with pytest.raises(SlimbridgeError, match="zero point"):
        grid_of(-1, 1, Scheme(symmetric=False, definition="paddle"))


# Limits


WEIGHT = np.random.default_rng(2).standard_normal((4, 6, 2)).astype(np.float32)


def test_limits_of_a_tensor_of_channels_and_of_groups() -> None:
    low, high = limits_of(WEIGHT)
    assert (low, high) == (WEIGHT.min(), WEIGHT.max())
    low, high = limits_of(WEIGHT, axis=1)
    assert low.tolist() == [WEIGHT[:, i].min() for i in range(6)]
    assert high.tolist() == [WEIGHT[:, i].max() for i in range(6)]
    low, high = limits_of(WEIGHT, axis=0, group=4)
    flat = WEIGHT.reshape(4, 12)
    assert low.tolist() == [flat[row, g * 4 : g * 4 + 4].min() for row in range(4) for g in range(3)]
    assert low.dtype == high.dtype == np.float64


@pytest.mark.parametrize("group", [5, 0, 13, -4])
def test_groups_that_do_not_divide_a_row_are_refused(group: int) -> None:
    with pytest.raises(SlimbridgeError, match="12 entries"):
        limits_of(WEIGHT, axis=0, group=group)
    grid = QuantParams(step=(1.0,), low=-1, high=1, axis=0, group=group)
    with pytest.raises(SlimbridgeError, match="12 entries"):
        to_integers(WEIGHT, grid)


def test_steps_that_do_not_fit_the_shape_are_refused() -> None:
    for grid in (
        QuantParams(step=(1.0, 2.0), low=-1, high=1, axis=0),
        QuantParams(step=(1.0,) * 4, low=-1, high=1, axis=3),
        QuantParams(step=(1.0,) * 5, low=-1, high=1, axis=0, group=4),
    ):
        with pytest.raises(SlimbridgeError, match="do not fit"):
            to_integers(WEIGHT, grid)
        with pytest.raises(SlimbridgeError, match="do not fit"):
            to_reals(np.zeros(WEIGHT.shape, np.int8), grid)


# Integers


TIES = np.array([0.25, 0.75, 1.25, -0.25, -0.75, 100.0, -100.0, 63.75, np.inf, -np.inf], np.float32)


def test_ties_go_where_the_grid_says_and_ends_are_clipped() -> None:
    even = QuantParams(step=(0.5,), low=-127, high=127)
    assert to_integers(TIES, even).tolist() == [0, 2, 2, 0, -2, 127, -127, 127, 127, -127]
    away = even.model_copy(update={"rounding": "away"})
    assert to_integers(TIES, away).tolist() == [1, 2, 3, -1, -2, 127, -127, 127, 127, -127]


def test_half_away_is_exact_next_to_a_half() -> None:
    """The largest number below a half plus a half is 1 in float32."""
    below = np.nextafter(np.float32(0.5), np.float32(0))
    grid = QuantParams(step=(1.0,), low=-8, high=7, rounding="away")
    assert to_integers(np.array([below, -below, 0.5]), grid).tolist() == [0, 0, 1]


def test_a_zero_point_moves_the_integers() -> None:
    grid = QuantParams(step=(0.5,), zero_point=(3,), low=-128, high=127)
    values = np.array([0.0, 1.0, -1.0, 500.0], np.float32)
    assert to_integers(values, grid).tolist() == [3, 5, 1, 127]
    assert to_reals(to_integers(values, grid), grid).tolist() == [0.0, 1.0, -1.0, 62.0]


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_integers(np.array([np.nan]), QuantParams(step=(1.0,), low=0, high=1))


def test_channels_each_have_their_grid() -> None:
    """Against a loop over the channels of axis 1, asymmetric."""
    scheme = Scheme(symmetric=False, bits=5, weight=True)
    grid = grid_of(*limits_of(WEIGHT, axis=1), scheme, axis=1)
    integers = to_integers(WEIGHT, grid)
    for channel in range(6):
        part = WEIGHT[:, channel]
        single = grid_of(*limits_of(part), scheme)
        np.testing.assert_array_equal(integers[:, channel], to_integers(part, single))
        np.testing.assert_array_equal(to_reals(integers, grid)[:, channel], to_reals(integers[:, channel], single))
    assert step_array(grid, 3).shape == zero_point_array(grid, 3).shape == (1, 6, 1)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_each_have_their_grid(symmetric: bool) -> None:
    scheme = Scheme(bits=4, symmetric=symmetric, weight=True)
    grid = grid_of(*limits_of(WEIGHT, group=4), scheme, group=4)
    assert (grid.axis, grid.group, len(grid.step)) == (0, 4, 12)
    integers = to_integers(WEIGHT, grid)
    rows, back = WEIGHT.reshape(12, 4), integers.reshape(12, 4)
    for index, row in enumerate(rows):
        single = grid_of(*limits_of(row), scheme)
        np.testing.assert_array_equal(back[index], to_integers(row, single))
        np.testing.assert_array_equal(to_reals(integers, grid).reshape(12, 4)[index], to_reals(back[index], single))


def test_a_group_as_long_as_the_row_is_per_channel() -> None:
    grid = grid_of(*limits_of(WEIGHT, group=12), Scheme(weight=True), group=12)
    channels = grid_of(*limits_of(WEIGHT, axis=0), Scheme(weight=True), axis=0)
    assert grid.step == channels.step
    np.testing.assert_array_equal(to_integers(WEIGHT, grid), to_integers(WEIGHT, channels))


@given(hnp.arrays(np.float32, (3, 4), elements=FLOATS), SCHEMES, st.sampled_from([None, 0, 1]))
def test_a_round_trip_is_off_by_half_a_step_at_most(weight: Array, scheme: Scheme, axis: Any) -> None:
    """In exact arithmetic half a step; step, division and product in float32 add a rounding of the value each."""
    grid = grid_of(*limits_of(weight, axis), scheme, axis)
    integers = to_integers(weight, grid)
    assert integers.dtype == (np.int8 if grid.low < 0 else np.uint8)
    assert grid.low <= integers.min() and integers.max() <= grid.high
    assert all(grid.low <= zero <= grid.high for zero in grid.zero_point)
    error = np.abs(to_reals(integers, grid).astype(np.float64) - weight)
    largest = max(np.abs(weight).max(), *grid.step)
    assert (error <= step_array(grid, 2).astype(np.float64) / 2 + 3 * EPS * largest).all()


@given(hnp.arrays(np.float32, (3, 5), elements=FLOATS), SCHEMES)
def test_quantizing_twice_changes_nothing_and_zeros_stay(weight: Array, scheme: Scheme) -> None:
    grid = grid_of(*limits_of(weight, 0), scheme, 0)
    once = to_reals(to_integers(weight, grid), grid)
    np.testing.assert_array_equal(to_reals(to_integers(once, grid), grid), once)
    assert not once[weight == 0].any()


@given(hnp.arrays(np.float32, (2, 5), elements=FLOATS), st.integers(2, 8))
def test_ranges_that_are_trained_have_the_same_grids(ends: Array, bits: int) -> None:
    """Computed in float32, as a model does: steps of symmetric grids are the same bit for bit, those of asymmetric
    ones miss at most the rounding of the range's width."""
    low, high = ends.min(axis=0), ends.max(axis=0)
    grid = grid_of(low, high, Scheme(bits=bits, weight=True), axis=0)
    step = symmetric(HOST, Constants(), np.maximum(-low, high).clip(0), grid.high)
    assert grid.step == tuple(step.tolist())
    grid = grid_of(low, high, Scheme(bits=bits, symmetric=False), axis=0)
    step, zero = asymmetric(HOST, Constants(), low, high, grid.low, grid.high)
    assert (np.abs(step / np.array(grid.step) - 1) <= 2 * EPS).all()
    exact = np.minimum(low, 0).astype(np.float64) / np.array(grid.step)
    clear = np.abs(np.abs(exact) % 1 - 0.5) > 1024 * EPS
    assert np.array_equal(zero[clear], np.array(grid.zero_point)[clear])
