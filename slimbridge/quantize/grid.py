"""The integer grid: step, rounding, clipping. The only place where these formulas stand."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import QuantParams
from slimbridge.ports import Array, as_float64


def symmetric_limit(bits: int) -> int:
    """Largest integer of a symmetric signed grid: 2**(bits-1) - 1, so 127 for 8 bits; the smallest is its negative."""
    if not 2 <= bits <= 16:
        raise ValueError(f"bits must be 2..16, found {bits}")
    return int(2 ** (bits - 1) - 1)


def symmetric_step(threshold: Array, bits: int) -> NDArray[np.float32]:
    """Step of a symmetric signed grid, -(2**(bits-1)-1) .. 2**(bits-1)-1.

    Computed in float64 and rounded once to float32, the type in which models use it. A threshold of 0 (a tensor
    of zeros) gives a step of 1, so that nothing divides by zero and zeros stay zeros.

    Args:
        threshold: largest magnitude to represent, real units, shape (channels,) or ().
        bits: word length, 2..16.

    Returns:
        Real units per integer, same shape.

    Raises:
        ValueError: a threshold is negative or not finite.
    """
    values = as_float64(threshold)
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("a threshold must be finite and not negative")
    step = (values / symmetric_limit(bits)).astype(np.float32)
    return np.asarray(np.where(step > 0, step, np.float32(1)), dtype=np.float32)


def to_integers(values: Array, grid: QuantParams) -> NDArray[np.int8]:
    """round(values / step) + zero_point, half to even, clipped to low..high.

    Args:
        values: real numbers, any shape; `grid.axis` must exist in it.
        grid: at most 8 bits.

    Returns:
        int8, same shape.
    """
    scaled = np.asarray(values, np.float32) / step_array(grid, values.ndim)
    clipped = np.clip(np.rint(scaled) + grid.zero_point, grid.low, grid.high)
    return np.asarray(clipped, dtype=np.int8)


def to_reals(integers: NDArray[np.int8], grid: QuantParams) -> NDArray[np.float32]:
    """Step * (integers - zero_point) in float32, the inverse of `to_integers` on the grid."""
    return np.asarray((integers.astype(np.float32) - grid.zero_point) * step_array(grid, integers.ndim))


def step_array(grid: QuantParams, ndim: int) -> NDArray[np.float32]:
    """The step as float32, shaped to broadcast over an array of `ndim` axes."""
    step = np.asarray(grid.step, np.float32)
    if grid.axis is None:
        return step.reshape(())
    shape = [1] * ndim
    shape[grid.axis] = step.size
    return step.reshape(shape)
