"""Steps from ranges, written once for native tensors and for NumPy, in the dtype of the tensors.

A grid that is read back from a trained model is thus the one that the model computed with, bit for bit in float32.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from slimbridge.decisions import QuantParams
from slimbridge.errors import ModelError
from slimbridge.ports import Array, Ops, Tensor

TINY = 2.0**-64
"""Smallest step or threshold of a learned range; far below any that is of use, and its reciprocal is finite."""
NORMAL = float(np.finfo(np.float32).tiny)
"""Smallest normal float32 number; some devices take smaller ones for 0."""


def symmetric_limit(bits: int) -> int:
    """Largest integer of a symmetric signed grid, 2**(bits-1) - 1; the smallest is its negative."""
    return int(2 ** (bits - 1) - 1)


class Arithmetic(Protocol):
    """The part of `Ops` that these formulas need."""

    def constant(self, array: Array, like: Tensor) -> Tensor: ...  # noqa: D102
    def divide(self, x: Tensor, y: Tensor) -> Tensor: ...  # noqa: D102
    def abs(self, x: Tensor) -> Tensor: ...  # noqa: D102
    def relu(self, x: Tensor) -> Tensor: ...  # noqa: D102
    def round(self, x: Tensor) -> Tensor: ...  # noqa: D102
    def clip(self, x: Tensor, low: float, high: float) -> Tensor: ...  # noqa: D102
    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor: ...  # noqa: D102


class Host:
    """The same operations on NumPy arrays."""

    def constant(self, array: Array, like: Tensor) -> Tensor:
        """The array in the dtype of `like`."""
        return np.asarray(array, like.dtype)

    def divide(self, x: Tensor, y: Tensor) -> Tensor:
        """The quotient."""
        return x / y

    def abs(self, x: Tensor) -> Tensor:
        """Magnitude."""
        return np.abs(x)

    def relu(self, x: Tensor) -> Tensor:
        """Larger of x and 0."""
        return np.maximum(x, np.zeros((), x.dtype))

    def round(self, x: Tensor) -> Tensor:
        """Half to even."""
        return np.rint(x)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """Limited to low..high."""
        return np.clip(x, low, high)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`x` where the condition holds, else `y`."""
        return np.where(condition, x, y)


HOST = Host()


class Constants:
    """Native tensors of numbers, made once for each dtype and device; a copy starts without any."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, ops: Arithmetic, value: float | Array, like: Tensor) -> Tensor:
        """The value as a tensor in the dtype and on the device of `like`; an array must live as long as this."""
        key = (type(ops), id(value) if isinstance(value, np.ndarray) else value, str(like.dtype), _device(like))
        if key not in self._made:
            self._made[key] = ops.constant(np.asarray(value), like)
        return self._made[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return Constants, ()


def _device(tensor: Tensor) -> str:
    return str(getattr(tensor, "device", ""))


def magnitude(ops: Arithmetic, smallest: Tensor, largest: Tensor) -> Tensor:
    """Largest magnitude between two limits."""
    return ops.where(largest > -smallest, largest, -smallest)


def symmetric(ops: Arithmetic, constants: Constants, threshold: Tensor, limit: int) -> Tensor:
    """Step = threshold / limit; 1 where that is 0 or subnormal in float32, so that zeros stay zeros.

    In float32 the same number as the float64 quotient rounded once: a quotient of two 24-bit numbers is never so near
    to the middle of two others that 53 bits would not tell (Figueroa 1995, "When is double rounding innocuous?").
    """
    step = ops.divide(threshold, constants(ops, float(limit), threshold))
    return ops.where(step < constants(ops, NORMAL, step), constants(ops, 1.0, step), step)


def asymmetric(
    ops: Arithmetic, constants: Constants, smallest: Tensor, largest: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Step and zero point of a grid from min(smallest, 0) to max(largest, 0); step 1 where both are 0.

    Source: ONNX operator DynamicQuantizeLinear-11, for 0..255; the step of 1 is ONNX Runtime's.
    """
    bottom, top = -ops.relu(-smallest), ops.relu(largest)
    step = symmetric(ops, constants, top - bottom, high - low)
    zero_point = ops.clip(ops.round(ops.divide(-bottom, step)) + constants(ops, float(low), step), low, high)
    return step, zero_point


def positive(ops: Arithmetic, constants: Constants, value: Tensor) -> Tensor:
    """The larger of the value's magnitude and `TINY`.

    A parameter that an update took below 0 thus counts by its magnitude, and its gradient turns its sign with it: it
    is never stuck, as it would be behind a limit at a small positive number.
    """
    size = ops.abs(value)
    return ops.where(size > TINY, size, constants(ops, TINY, size))


def grouped(ops: Ops, x: Tensor, group: int, where: str) -> Tensor:
    """The rows of axis 0, flattened, cut into groups: shape (rows * groups, group).

    Raises:
        ModelError: the rows' length is no multiple of `group`.
    """
    shape = ops.shape(x)
    length = int(np.prod(shape[1:], dtype=np.int64))
    if length % group:
        raise ModelError(f"{where}: rows of {length} entries cannot be cut into groups of {group}")
    return ops.reshape(x, (shape[0] * length // group, group))


def params(
    step: Array,
    zero_point: Array | None,
    integers: tuple[int, int],
    axis: int | None = None,
    group: int | None = None,
    away: bool = False,
) -> QuantParams:
    """The grid of steps and zero points, rounded to float32 and to whole numbers.

    Args:
        step: shape () or (steps,).
        zero_point: likewise; None is 0.
        integers: smallest and largest integer.
        axis, group: see `QuantParams`.
        away: halves are rounded away from zero.
    """
    zeros = (0,) if zero_point is None else tuple(int(z) for z in np.ravel(zero_point))
    rounding: Literal["even", "away"] = "away" if away else "even"
    return QuantParams(
        step=tuple(float(s) for s in np.ravel(np.asarray(step, np.float32))),
        zero_point=zeros,
        low=integers[0],
        high=integers[1],
        axis=axis,
        group=group,
        rounding=rounding,
    )
