"""Fake quantization as one differentiable operation, and the extremes of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

Tensor = Any

_CHUNK = 1 << 17
"""Entries that are worked on at once: several operations in place on 512 KB cost about as much as one over memory."""


@dataclass(frozen=True)
class _Grid:
    """The grid of one call.

    Attributes:
        low, high: smallest and largest integer.
        axis: channel axis of the step, None for one step.
        away: halves are rounded away from zero.
    """

    low: int
    high: int
    axis: int | None
    away: bool


def fake_quant(
    x: Tensor, step: Tensor, zero_point: Tensor | None, low: int, high: int, axis: int | None, away: bool
) -> Tensor:
    """See `slimbridge.ports.Ops.fake_quant`."""
    if axis is not None:
        axis %= x.ndim
    return _FakeQuant.apply(x, step, zero_point, _Grid(low, high, axis, away))


def extremes(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry, shape () or (channels,), without a gradient."""
    x = x.detach()
    if axis is None:
        found = torch.aminmax(x)
        return found.min, found.max
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    # torch.aminmax over an axis takes six times as long as these two.
    return (torch.amin(x, others), torch.amax(x, others)) if others else (x.clone(), x.clone())


class _FakeQuant(torch.autograd.Function):
    """Works in place on one new tensor, chunk by chunk; keeps its input only where the gradient needs it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, zero_point: Tensor | None, grid: _Grid) -> Tensor:
        out = torch.empty_like(x)
        wanted = any(ctx.needs_input_grad)
        # Reading back a number makes a GPU wait, so that there everything may be clipped.
        clipped = wanted and x.device.type != "cpu"
        look = wanted and not clipped
        for (source, target), steps, zeros in _chunks((x, out), step, zero_point, grid.axis):
            _integers(source, steps, grid.away, out=target)
            if zeros is not None:
                target.add_(zeros)
            if not look or not _inside(target, grid.low, grid.high):
                target.clamp_(grid.low, grid.high)
                clipped = True
            if zeros is not None:
                target.sub_(zeros)
            target.mul_(steps)
        ctx.grid, ctx.clipped = grid, clipped
        if wanted and (clipped or ctx.needs_input_grad[1]):
            ctx.save_for_backward(x, step, zero_point)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if not ctx.clipped and not ctx.needs_input_grad[1]:
            return grad, None, None, None
        x, step, zero_point = ctx.saved_tensors
        grad = grad.contiguous() if x.is_contiguous() else grad
        if ctx.needs_input_grad[1]:
            return *_both_gradients(grad, x, step, zero_point, ctx.grid, ctx.clipped), None, None
        return _input_gradient(grad, x, step, zero_point, ctx.grid), None, None, None


def _integers(x: Tensor, step: Tensor, away: bool, out: Tensor) -> None:
    """The nearest whole number of steps."""
    _whole(torch.div(x, step, out=out), away, out)


def _whole(value: Tensor, away: bool, out: Tensor) -> None:
    """The nearest whole number; `out` may be the tensor itself."""
    if not away:
        torch.round(value, out=out)
        return
    # The largest number below a half: a half itself would take 0.49999997 up to 1.
    half = math.nextafter(0.5, 0) if value.dtype == torch.float64 else 0.5 - 2.0**-25
    torch.add(value, torch.copysign(value.new_tensor(half), value), out=out).trunc_()


def _inside(integers: Tensor, low: int, high: int) -> bool:
    found = torch.aminmax(integers)
    return bool(found.min >= low) and bool(found.max <= high)


def _chunks(
    tensors: tuple[Tensor, ...], step: Tensor, zero_point: Tensor | None, axis: int | None
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor | None]]:
    """Pieces of tensors of one shape, with step and zero point shaped to meet them."""
    x = tensors[0]
    if axis is not None:
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        step = step.reshape(shape)
        zero_point = None if zero_point is None else zero_point.reshape(shape)
    whole = x.device.type != "cpu" or x.numel() <= _CHUNK
    if whole or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors, step, zero_point
        return
    if axis is None:
        for pieces in zip(*(tensor.view(-1).split(_CHUNK) for tensor in tensors), strict=True):
            yield pieces, step, zero_point
        return
    rows = max(1, _CHUNK * x.shape[0] // x.numel())
    for at in range(0, x.shape[0], rows):
        part = slice(at, at + rows)
        own = part if axis == 0 else slice(None)
        yield tuple(t[part] for t in tensors), step[own], None if zero_point is None else zero_point[own]


def _input_gradient(grad: Tensor, x: Tensor, step: Tensor, zero_point: Tensor | None, grid: _Grid) -> Tensor:
    """The gradient itself where the integer is on the grid, else 0."""
    result = torch.empty_like(x)
    spare: list[Tensor] = []
    for (source, upper, target), steps, zeros in _chunks((x, grad, result), step, zero_point, grid.axis):
        (integers,) = _buffers(spare, source, 1)
        _integers(source, steps, grid.away, out=integers)
        if zeros is not None:
            integers.add_(zeros)
        _mask(upper, integers, grid, target)
    return result


def _buffers(spare: list[Tensor], like: Tensor, count: int) -> list[Tensor]:
    """Tensors to work in, the same ones for all chunks but a smaller last one."""
    if not spare or spare[0].shape != like.shape:
        spare[:] = [torch.empty_like(like) for _ in range(count)]
    return spare


def _mask(grad: Tensor, integers: Tensor, grid: _Grid, out: Tensor) -> None:
    """`grad` where low <= integers <= high, else 0, in one pass: the gradient of a clip to limits in between."""
    torch.ops.aten.hardtanh_backward.grad_input(grad, integers, grid.low - 0.5, grid.high + 0.5, grad_input=out)


def _both_gradients(
    grad: Tensor, x: Tensor, step: Tensor, zero_point: Tensor | None, grid: _Grid, clipped: bool
) -> tuple[Tensor, Tensor]:
    """For the input, masked, and for the step: Esser et al. 2020, equation 3, summed over what shares the step."""
    result = torch.empty_like(x) if clipped else grad
    sums = torch.zeros(step.shape, dtype=x.dtype, device=x.device)
    spare: list[Tensor] = []
    first = 0
    for (source, upper, target), steps, zeros in _chunks((x, grad, result), step, zero_point, grid.axis):
        value, slope = _buffers(spare, source, 2)
        torch.div(source, steps, out=value)
        _whole(value, grid.away, out=slope)
        if clipped:
            if zeros is not None:
                slope.add_(zeros)
            _mask(upper, slope, grid, target)
            slope.clamp_(grid.low, grid.high)
            if zeros is not None:
                slope.sub_(zeros)
            # The grid's integer times the gradient, less the value times the gradient where that went through.
            slope.mul_(upper).addcmul_(value, target, value=-1)
        else:
            slope.sub_(value).mul_(upper)
        if grid.axis is None:
            sums += slope.sum()
            continue
        part = slope.sum([i for i in range(slope.ndim) if i != grid.axis])
        own = slice(first, first + len(part))
        sums[own] += part
        first += len(part) if grid.axis == 0 else 0
    return result, sums.to(step.dtype)
