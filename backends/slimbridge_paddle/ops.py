"""`slimbridge.ports.Ops` for Paddle; see there for what each one means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import paddle

from slimbridge.ports import Array, Tensor
from slimbridge_paddle._compat import round_half_even, true_divide
from slimbridge_paddle.fake_quant import Grid, extremes, fake_quant
from slimbridge_paddle.tensors import copied, dtype_name, place_of

Axis: TypeAlias = int | tuple[int, ...] | None


class PaddleOps:
    """Differentiable operations on Paddle tensors."""

    def numpy(self, x: Tensor) -> Array:
        """A copy on the host."""
        return copied(x.detach())

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Sizes as Python integers."""
        return tuple(int(size) for size in x.shape)

    def stop_gradient(self, x: Tensor) -> Tensor:
        """The same values, without a gradient."""
        return x.detach()

    def cast(self, x: Tensor, like: Tensor) -> Tensor:
        """To the dtype and device of `like`."""
        return x.astype(like.dtype) if x.place == like.place else paddle.to_tensor(x, like.dtype, place_of(like))

    def constant(self, array: Array, like: Tensor) -> Tensor:
        """A tensor of an array, in the dtype and on the device of `like`."""
        return paddle.to_tensor(np.asarray(array, dtype_name(like)), place=place_of(like))

    def divide(self, x: Tensor, y: Tensor) -> Tensor:
        """The quotient, rounded as IEEE 754 says."""
        return true_divide(x, y)

    def sum(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Sum over axes."""
        return paddle.sum(x, axis=axis, keepdim=keepdims)

    def mean(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Mean over axes."""
        return paddle.mean(x, axis=axis, keepdim=keepdims)

    def max(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Largest value over axes; equal values share the gradient."""
        return paddle.amax(x, axis=axis, keepdim=keepdims)

    def abs(self, x: Tensor) -> Tensor:
        """Magnitude; its gradient at 0 is 0."""
        return paddle.abs(x)

    def exp(self, x: Tensor) -> Tensor:
        """Exponential."""
        return paddle.exp(x)

    def log(self, x: Tensor) -> Tensor:
        """Natural logarithm."""
        return paddle.log(x)

    def sqrt(self, x: Tensor) -> Tensor:
        """Square root."""
        return paddle.sqrt(x)

    def relu(self, x: Tensor) -> Tensor:
        """Larger of x and 0."""
        return paddle.nn.functional.relu(x)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """Limited to low..high; the gradient outside is 0, at the limits 1."""
        return paddle.clip(x, low, high)

    def round(self, x: Tensor) -> Tensor:
        """To the nearest integer, half to even; its gradient is zero."""
        return round_half_even(x)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`x` where the condition holds, else `y`."""
        return paddle.where(condition, x, y)

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        """Softmax over one axis."""
        return paddle.nn.functional.softmax(x, axis=axis)

    def log_softmax(self, x: Tensor, axis: int) -> Tensor:
        """Logarithm of the softmax over one axis."""
        return paddle.nn.functional.log_softmax(x, axis=axis)

    def one_hot(self, labels: Tensor, classes: int, like: Tensor) -> Tensor:
        """Integer labels -> a last axis of `classes`, in the dtype and on the device of `like`."""
        return self.cast(paddle.nn.functional.one_hot(labels.astype("int64"), classes), like)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same entries in another shape; one size may be -1."""
        return paddle.reshape(x, list(shape))

    def transpose(self, x: Tensor, perm: Sequence[int]) -> Tensor:
        """Axes in the order of `perm`."""
        return paddle.transpose(x, list(perm))

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors joined along an axis."""
        return paddle.concat(list(xs), axis=axis)

    def extremes(self, x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
        """Smallest and largest entry, of all or for each index of one axis."""
        return extremes(x, axis)

    def fake_quant(
        self,
        x: Tensor,
        step: Tensor,
        zero_point: Tensor | None,
        low: int,
        high: int,
        axis: int | None = None,
        away: bool = False,
    ) -> Tensor:
        """The nearest value of the grid; see the port for the formula and its gradients."""
        zero = None if zero_point is None else zero_point.detach().astype(x.dtype)
        return fake_quant(x, step, Grid(low, high, axis, away, zero))
