"""The integer grid: step, zero point, rounding, clipping. The only place where these formulas stand.

A grid is made by the conventions of one of three definitions (`Scheme.definition`), b bits:

* "own": weights symmetric -(2**(b-1)-1) .. 2**(b-1)-1, so that a grid is the same on both sides of 0; activations
  symmetric -2**(b-1) .. 2**(b-1)-1, or 0 .. 2**b-1 where no value is negative. The largest magnitude falls on the
  largest integer. Asymmetric grids use all 2**b integers, from 0 for activations; 0 is always one of their values
  (Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
  section 2.1).
* "paddle": what Paddle's `fake_quantize_dequantize` operators do: symmetric, +-(2**(b-1)-1) for weights and
  activations of either sign, halves away from zero (round_type 1, Paddle 3.3).
* "torch": what the observers of `torch.ao.quantization` compute (PyTorch 2.13, `UniformQuantizationObserverBase`), in
  float32 as they do: all 2**b integers, weights from -2**(b-1), activations from 0; symmetric steps are the largest
  magnitude over (2**b-1)/2, and symmetric activations have their zero point in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import QuantParams
from slimbridge.errors import SlimbridgeError
from slimbridge.plan.registries import Scheme
from slimbridge.ports import Array, as_float64

EPS = np.finfo(np.float32).eps
"""The smallest step of the definition "torch"."""


def grid_of(
    low: Array | float, high: Array | float, scheme: Scheme, axis: int | None = None, group: int | None = None
) -> QuantParams:
    """The grid that represents low .. high.

    Steps are computed in float64 and rounded once to float32, the type in which models use them ("torch": in
    float32). A range of 0, or so near to it that its step is no normal float32 number, gives a step of 1 ("torch":
    its smallest step), so that nothing divides by zero and zeros stay zeros.

    Args:
        low, high: smallest and largest value to represent, real units, shape () or (steps,).
        scheme: bits and conventions.
        axis: channel axis that the steps belong to.
        group: entries of one row that share a step; the axis is then 0.

    Raises:
        ValueError: limits that are not finite or in the wrong order, or bits outside 2..8.
        SlimbridgeError: the definition has no such grid.
    """
    lows, highs = np.array(low, np.float64).ravel(), np.array(high, np.float64).ravel()
    if not (np.isfinite(lows).all() and np.isfinite(highs).all()) or (lows > highs).any():
        raise ValueError("limits must be finite, the lower one not above the higher one")
    if not 2 <= scheme.bits <= 8:
        raise ValueError(f"bits must be 2..8, found {scheme.bits}")
    made = _MAKERS[scheme.definition](np.minimum(lows, 0), np.maximum(highs, 0), scheme)
    step = np.asarray(made.step, np.float32)
    if not np.isfinite(step).all():
        raise ValueError("limits must be within float32")
    return QuantParams(
        step=tuple(step.tolist()),
        zero_point=tuple(int(zero) for zero in np.atleast_1d(made.zero_point)),
        low=made.low,
        high=made.high,
        axis=axis if group is None else 0,
        group=group,
        rounding=made.rounding,
    )


@dataclass(frozen=True)
class _Made:
    step: Array
    low: int
    high: int
    zero_point: Array | int = 0
    rounding: Literal["even", "away"] = "even"


def _own(low: Array, high: Array, scheme: Scheme) -> _Made:
    top, all_positive = 2 ** (scheme.bits - 1) - 1, bool((low >= 0).all())
    if scheme.symmetric:
        smallest, largest = -top - (not scheme.weight), top
        if all_positive and not scheme.weight:
            smallest, largest = 0, 2**scheme.bits - 1
        return _Made(_positive(np.maximum(-low, high) / largest), smallest, largest)
    smallest = -top - 1 if scheme.weight else 0
    largest = smallest + 2**scheme.bits - 1
    step = _positive((high - low) / (2**scheme.bits - 1))
    return _Made(step, smallest, largest, np.clip(smallest + np.rint(-low / as_float64(step)), smallest, largest))


def _paddle(low: Array, high: Array, scheme: Scheme) -> _Made:
    if not scheme.symmetric:
        raise SlimbridgeError("definition 'paddle' has symmetric grids only: Paddle's quanters ignore the zero point")
    top = 2 ** (scheme.bits - 1) - 1
    return _Made(_positive(np.maximum(-low, high) / top), -top, top, rounding="away")


def _torch(low: Array, high: Array, scheme: Scheme) -> _Made:
    with np.errstate(over="ignore"):
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
    levels = 2**scheme.bits - 1
    smallest = -(2 ** (scheme.bits - 1)) if scheme.weight else 0
    largest = smallest + levels
    if scheme.symmetric:
        step = np.maximum(np.maximum(-low32, high32) / np.float32(levels / 2), EPS)
        # With all 8 bits the middle is rounded up, with a narrower range, which the user has to set, down.
        middle = 128 if scheme.bits == 8 else levels // 2
        return _Made(step, smallest, largest, 0 if scheme.weight else middle)
    step = np.maximum((high32 - low32) / np.float32(levels), EPS)
    return _Made(step, smallest, largest, np.clip(smallest - np.rint(low32 / step), smallest, largest))


_MAKERS = {"own": _own, "paddle": _paddle, "torch": _torch}


def _positive(step: Array) -> NDArray[np.float32]:
    """Rounded to float32; 1 where that is 0 or subnormal, which some devices take for 0."""
    with np.errstate(over="ignore"):
        rounded = step.astype(np.float32)
    return np.asarray(np.where(rounded >= np.finfo(np.float32).tiny, rounded, np.float32(1)), np.float32)


def limits_of(weight: Array, axis: int | None = None, group: int | None = None) -> tuple[Array, Array]:
    """Smallest and largest entry, float64, of all, for each index of `axis`, or for each group of a row of axis 0.

    Returns:
        Two arrays of shape (), (channels,) or (rows * groups,), as `grid_of` takes them.

    Raises:
        SlimbridgeError: the rows do not divide into such groups.
    """
    values = as_float64(weight)
    if group is not None:
        rows = _grouped(values, group)
        return rows.min(axis=1), rows.max(axis=1)
    if axis is None:
        return values.min(), values.max()
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return rows.min(axis=1), rows.max(axis=1)


def to_integers(values: Array, grid: QuantParams) -> NDArray[Any]:
    """round(values / step) + zero_point, clipped to low..high; halves as `grid.rounding` says.

    Values and quotient are float32, as in a model: float64 values are rounded to it first.

    Args:
        values: real numbers, any shape that has `grid.axis`; infinite ones are clipped.
        grid: at most 8 bits.

    Returns:
        Same shape; int8, or uint8 where `grid.low` is not negative.

    Raises:
        ValueError: a value is NaN.
        SlimbridgeError: the shape does not fit the steps.
    """
    folded = _grouped(np.asarray(values, np.float32), grid.group)
    if np.isnan(folded).any():
        raise ValueError("values must not be NaN")
    _check(folded, grid)
    with np.errstate(over="ignore"):
        rounded = _rounded(folded / step_array(grid, folded.ndim), grid.rounding)
    clipped = np.clip(rounded + zero_point_array(grid, folded.ndim), grid.low, grid.high)
    return np.asarray(clipped, np.int8 if grid.low < 0 else np.uint8).reshape(np.shape(values))


def to_reals(integers: NDArray[Any], grid: QuantParams) -> NDArray[np.float32]:
    """Step * (integer - zero_point) in float32, the inverse of `to_integers` on the grid."""
    folded = _grouped(np.asarray(integers, np.float32), grid.group)
    _check(folded, grid)
    reals = (folded - zero_point_array(grid, folded.ndim)) * step_array(grid, folded.ndim)
    return np.asarray(reals, np.float32).reshape(np.shape(integers))


def step_array(grid: QuantParams, ndim: int) -> NDArray[np.float32]:
    """The step as float32, shaped to broadcast over an array of `ndim` axes, or over (steps, group)."""
    return _spread(grid, grid.step, ndim)


def zero_point_array(grid: QuantParams, ndim: int) -> NDArray[np.float32]:
    """The zero point, likewise."""
    return _spread(grid, grid.zero_point, ndim)


def _spread(grid: QuantParams, numbers: tuple[float, ...], ndim: int) -> NDArray[np.float32]:
    array = np.asarray(numbers, np.float32)
    if array.size == 1:
        return array.reshape(())
    if grid.group is not None:
        return array.reshape(-1, 1)
    shape = [1] * ndim
    shape[grid.axis or 0] = array.size
    return array.reshape(shape)


def _grouped(values: Array, group: int | None) -> Array:
    """As (rows * groups, group), or unchanged without groups."""
    if group is None:
        return values
    size = values.size // max(1, len(values)) if values.ndim else 1
    if group < 1 or size % group:
        raise SlimbridgeError(f"groups of {group} do not divide the {size} entries of a row of shape {values.shape}")
    return values.reshape(-1, group)


def _check(folded: Array, grid: QuantParams) -> None:
    steps = len(grid.step)
    if steps == 1:
        return
    axis = 0 if grid.group is not None else grid.axis
    if axis is None or axis >= folded.ndim or folded.shape[axis] != steps:
        raise SlimbridgeError(f"{steps} steps along axis {axis} do not fit the shape {folded.shape}")


def _rounded(values: Array, rounding: str) -> Array:
    if rounding == "even":
        return np.rint(values)
    whole = np.trunc(values)
    with np.errstate(invalid="ignore"):  # of infinite values, which have no fraction
        halves = np.abs(values - whole) == 0.5
    return np.where(halves, whole + np.copysign(np.float32(1), values), np.rint(values))
