"""The differentiable operations of the port, on torch tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray

from slimbridge_torch.fake_quant import extremes, fake_quant
from slimbridge_torch.names import to_array

Tensor = Any
Axis = int | tuple[int, ...] | None


def _axes(x: Tensor, axis: Axis) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(x.ndim))
    return axis if isinstance(axis, tuple) else (axis,)


class TorchOps:
    """`slimbridge.ports.Ops` for PyTorch; see there for what each one means."""

    def numpy(self, x: Tensor) -> NDArray[Any]:
        """A copy on the host; bfloat16 becomes float32."""
        return to_array(x)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """Sizes as Python integers."""
        return tuple(x.shape)

    def stop_gradient(self, x: Tensor) -> Tensor:
        """The same values, without a gradient."""
        return x.detach()

    def cast(self, x: Tensor, like: Tensor) -> Tensor:
        """To the dtype and device of `like`."""
        return x.to(like)

    def constant(self, array: NDArray[Any], like: Tensor) -> Tensor:
        """A tensor of an array, in the dtype and on the device of `like`."""
        return torch.tensor(array, dtype=like.dtype, device=like.device)

    def divide(self, x: Tensor, y: Tensor) -> Tensor:
        """The quotient, rounded as IEEE 754 says."""
        return torch.div(x, y)

    def sum(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Sum over axes."""
        return torch.sum(x, dim=_axes(x, axis), keepdim=keepdims)

    def mean(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Mean over axes."""
        return torch.mean(x, dim=_axes(x, axis), keepdim=keepdims)

    def max(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """Largest value over axes; equal values share the gradient."""
        return torch.amax(x, dim=_axes(x, axis), keepdim=keepdims)

    def abs(self, x: Tensor) -> Tensor:
        """Magnitude; its gradient at 0 is 0."""
        return torch.abs(x)

    def exp(self, x: Tensor) -> Tensor:
        """Exponential."""
        return torch.exp(x)

    def log(self, x: Tensor) -> Tensor:
        """Natural logarithm."""
        return torch.log(x)

    def sqrt(self, x: Tensor) -> Tensor:
        """Square root."""
        return torch.sqrt(x)

    def relu(self, x: Tensor) -> Tensor:
        """Larger of x and 0."""
        return torch.relu(x)

    def clip(self, x: Tensor, low: float, high: float) -> Tensor:
        """Limited to low..high; the gradient outside is 0."""
        return torch.clamp(x, low, high)

    def round(self, x: Tensor) -> Tensor:
        """To the nearest integer, half to even; its gradient is zero."""
        return torch.round(x)

    def where(self, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """`x` where the condition holds, else `y`."""
        return torch.where(condition, x, y)

    def softmax(self, x: Tensor, axis: int) -> Tensor:
        """Softmax over one axis."""
        return torch.softmax(x, dim=axis)

    def log_softmax(self, x: Tensor, axis: int) -> Tensor:
        """Logarithm of the softmax over one axis."""
        return torch.log_softmax(x, dim=axis)

    def one_hot(self, labels: Tensor, classes: int, like: Tensor) -> Tensor:
        """Integer labels -> a last axis of `classes`, in the dtype and on the device of `like`."""
        return torch.nn.functional.one_hot(labels.to(like.device).long(), classes).to(like.dtype)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same entries in another shape; one size may be -1."""
        return torch.reshape(x, tuple(shape))

    def transpose(self, x: Tensor, perm: Sequence[int]) -> Tensor:
        """Axes in the order of `perm`."""
        return torch.permute(x, tuple(perm))

    def concat(self, xs: Sequence[Tensor], axis: int) -> Tensor:
        """Tensors joined along an axis."""
        return torch.cat(tuple(xs), dim=axis)

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
        return fake_quant(x, step, zero_point, low, high, axis, away)
