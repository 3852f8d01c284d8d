"""`Ops.extremes` and `Ops.fake_quant`: in NumPy on the tensors' own memory on the CPU, else in Paddle's operations.

The formulas are those of the port: `slimbridge.ports.Ops.fake_quant`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import paddle
from paddle.autograd import PyLayer

from slimbridge.ports import Array
from slimbridge_paddle import buffers
from slimbridge_paddle._compat import round_half_even, true_divide
from slimbridge_paddle.buffers import BLOCK, Block, around, blocks, contiguous, on_cpu, view

Tensor: TypeAlias = Any


@dataclass(frozen=True)
class Grid:
    """The integers of a grid.

    Attributes:
        low, high: smallest and largest.
        axis: channel axis of the step, None for one step.
        away: halves are rounded away from zero.
        zero: whole numbers as a tensor, in the form of the step; None is 0.
    """

    low: int
    high: int
    axis: int | None
    away: bool
    zero: Tensor | None = None

    def along(self, values: Tensor, x: Tensor) -> Tensor:
        """Steps or zero points in a shape to be broadcast over `x`."""
        if self.axis is None:
            return values.reshape([])
        axis = self.axis % len(x.shape)
        return values.reshape([-1 if index == axis else 1 for index in range(len(x.shape))])


def extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry; see `slimbridge.ports.Ops.extremes`."""
    x = x.detach()
    if not on_cpu(x):
        rest = _rest(x, axis)
        return (x.clone(), x.clone()) if rest == [] else (paddle.amin(x, axis=rest), paddle.amax(x, axis=rest))
    low, high = buffers.extremes(view(contiguous(x)).reshape(around(x.shape, axis)))
    shape = [] if axis is None else [-1]
    return paddle.to_tensor(low.reshape(shape)), paddle.to_tensor(high.reshape(shape))


def _rest(x: Tensor, axis: int | None) -> list[int] | None:
    """The other axes, None for all; [] is no axis here, though Paddle takes it for all."""
    return None if axis is None else [other for other in range(len(x.shape)) if other != axis % len(x.shape)]


def fake_quant(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """`x` on the grid, differentiable; see `slimbridge.ports.Ops.fake_quant`."""
    if paddle.is_grad_enabled() and not (x.stop_gradient and step.stop_gradient):
        return _FakeQuant.apply(x, step, grid)
    return _forward(x.detach(), step.detach(), grid, False)[0]


class _FakeQuant(PyLayer):
    """The operation with its gradients; what the step's needs is kept and computed only where it is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, grid: Grid) -> Tensor:
        ctx.constant, learned = x.stop_gradient, not step.stop_gradient
        x, step = x.detach(), step.detach()
        made, ctx.outside = _forward(x, step, grid, True)
        ctx.kept = (x, step, grid) if learned else None
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad = contiguous(grad)
        passed = _masked(grad, ctx.outside)
        to_step = _step_gradient(grad, passed, *ctx.kept) if ctx.kept else None
        return None if ctx.constant else passed, to_step  # Paddle refuses a gradient that it has no use for


def _forward(x: Tensor, step: Tensor, grid: Grid, marked: bool) -> tuple[Tensor, Any]:
    """The values and, if asked for, which entries are outside the grid (None: none is).

    Those are places in the flattened tensor on the CPU, where they are few, else a tensor of bools.
    """
    if on_cpu(x):
        return _cpu_forward(contiguous(x), step, grid, marked)
    step, zero = grid.along(step, x), None if grid.zero is None else grid.along(grid.zero, x)
    integers = _integers(x, step, zero, grid.away)
    outside = ~((integers >= grid.low) & (integers <= grid.high)) if marked else None
    clipped = paddle.clip(integers, grid.low, grid.high)
    return (clipped if zero is None else clipped - zero) * step, outside


def _integers(x: Tensor, step: Tensor, zero: Tensor | None, away: bool) -> Tensor:
    """round(x / step) + zero_point, in Paddle's operations."""
    scaled = true_divide(x, step)
    if away:
        half = paddle.full_like(scaled, _half(scaled.dtype == paddle.float64))
        rounded = paddle.trunc(paddle.where(scaled < 0, scaled - half, scaled + half))
    else:
        rounded = round_half_even(scaled)
    return rounded if zero is None else rounded + zero


def _half(double: bool) -> float:
    """The largest number below a half: a half itself, added to 0.49999997, gives 1."""
    return float(np.nextafter(0.5, 0)) if double else float(np.nextafter(np.float32(0.5), np.float32(0)))


@np.errstate(all="ignore")  # infinities and NaN are no surprise
def _cpu_forward(x: Tensor, step: Tensor, grid: Grid, marked: bool) -> tuple[Tensor, Array | None]:
    made = paddle.empty_like(x)
    sizes = around(x.shape, grid.axis)
    source, target = view(x).reshape(sizes), view(made).reshape(sizes)
    steps, zeros = _rows(step), None if grid.zero is None else _rows(grid.zero)
    places = []
    for block in blocks(sizes):
        values, own = target[block], _part(steps, block)
        np.divide(source[block], own, out=values)
        _round(values, grid.away, values)
        zero = None if zeros is None else _part(zeros, block)
        if zero is not None:
            values += zero
        if not (values.min() >= grid.low and values.max() <= grid.high):
            if marked:
                places.append(_outside(values, grid, block, sizes))
            np.minimum(values, grid.high, out=values)
            np.maximum(values, grid.low, out=values)
        if zero is not None:
            values -= zero
        values *= own
    return made, np.concatenate(places) if places else None


def _rows(values: Tensor) -> Array:
    """Steps or zero points, to be broadcast over the three axes of `around`."""
    return view(contiguous(values)).reshape(1, -1, 1)


def _part(values: Array, block: Block) -> Array:
    return values if values.size == 1 else values[:, block[1]]


def _round(value: Array, away: bool, out: Array) -> None:
    """The nearest whole number; `out` may be the array itself."""
    if away:
        np.add(value, np.copysign(value.dtype.type(_half(value.dtype == np.float64)), value), out=out)
        np.trunc(out, out=out)
    else:
        np.rint(value, out=out)


def _outside(values: Array, grid: Grid, block: Block, sizes: tuple[int, int, int]) -> Array:
    """Places, in the flattened tensor, of the entries of a block that are not within low..high; NaN is not."""
    i, j, k = (part.start for part in block)
    flat = values.reshape(-1)
    inside = flat >= grid.low
    inside &= flat <= grid.high
    return np.asarray(np.flatnonzero(~inside) + ((i * sizes[1] + j) * sizes[2] + k))


def _masked(grad: Tensor, outside: Any) -> Tensor:
    """The gradient, 0 outside the grid."""
    if outside is None:
        return grad
    if not on_cpu(grad):
        return paddle.where(outside, paddle.zeros_like(grad), grad)
    made = paddle.empty_like(grad)
    values = view(made).reshape(-1)
    values[:] = view(grad).reshape(-1)
    values[outside] = 0
    return made


def _step_gradient(grad: Tensor, passed: Tensor, x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Esser et al. 2020, equation 3: (clipped integer - zero point) * grad - x / step * (grad where it went through).

    Summed over the entries that share a step.
    """
    if on_cpu(x):
        return paddle.to_tensor(_cpu_step_gradient(grad, passed, contiguous(x), step, grid).reshape(step.shape))
    along, zero = grid.along(step, x), None if grid.zero is None else grid.along(grid.zero, x)
    integers = paddle.clip(_integers(x, along, zero, grid.away), grid.low, grid.high)
    slope = (integers if zero is None else integers - zero) * grad - true_divide(x, along) * passed
    rest = _rest(x, grid.axis)
    return (slope if rest == [] else paddle.sum(slope, axis=rest)).reshape(step.shape)


@np.errstate(all="ignore")
def _cpu_step_gradient(grad: Tensor, passed: Tensor, x: Tensor, step: Tensor, grid: Grid) -> Array:
    sizes = around(x.shape, grid.axis)
    source, upper, through = (view(tensor).reshape(sizes) for tensor in (x, grad, passed))
    steps, zeros = _rows(step), None if grid.zero is None else _rows(grid.zero)
    total = np.zeros(sizes[1], source.dtype)
    spare = np.empty((2, min(BLOCK, source.size)), source.dtype)
    for block in blocks(sizes):
        shape = source[block].shape
        value, slope = (row[: prod(shape)].reshape(shape) for row in spare)
        np.divide(source[block], _part(steps, block), out=value)
        _round(value, grid.away, slope)
        if passed is grad:  # nothing is outside
            slope -= value
            slope *= upper[block]
        else:
            zero = 0 if zeros is None else _part(zeros, block)
            np.minimum(slope, grid.high - zero, out=slope)
            np.maximum(slope, grid.low - zero, out=slope)
            slope *= upper[block]
            value *= through[block]
            slope -= value
        total[block[1]] += slope.sum((0, 2))
    return total
