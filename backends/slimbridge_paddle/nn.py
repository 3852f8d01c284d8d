"""The layers of `slimbridge.ports.Backend.nn`, by PyTorch's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle

from slimbridge.ports import Tensor


class Namespace:
    """Layer factories and functions under PyTorch's names, so that a model is written once."""

    Module: Any = paddle.nn.Layer
    Sequential: Any = paddle.nn.Sequential
    ModuleList: Any = paddle.nn.LayerList
    ReLU: Any = paddle.nn.ReLU
    ReLU6: Any = paddle.nn.ReLU6
    Identity: Any = paddle.nn.Identity
    BatchNorm2d: Any = paddle.nn.BatchNorm2D
    Dropout: Any = paddle.nn.Dropout

    @staticmethod
    def Linear(in_features: int, out_features: int, bias: bool = True) -> Any:  # noqa: N802
        """Weight (in, out) inside Paddle, (out, in) in the canonical layout."""
        return paddle.nn.Linear(in_features, out_features, bias_attr=None if bias else False)

    @staticmethod
    def Conv2d(  # noqa: N802
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> Any:
        """A convolution; `padding` on each side, in pixels."""
        return paddle.nn.Conv2D(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=groups,
            bias_attr=None if bias else False,
        )

    @staticmethod
    def MaxPool2d(kernel_size: int, stride: int | None = None, padding: int = 0) -> Any:  # noqa: N802
        """Largest value of each window; the stride is the window's size unless it is given."""
        return paddle.nn.MaxPool2D(kernel_size, stride=stride, padding=padding)

    @staticmethod
    def AvgPool2d(kernel_size: int, stride: int | None = None, padding: int = 0) -> Any:  # noqa: N802
        """Mean of each window, padding counted."""
        return paddle.nn.AvgPool2D(kernel_size, stride=stride, padding=padding, exclusive=False)

    @staticmethod
    def AdaptiveAvgPool2d(size: int | tuple[int, int]) -> Any:  # noqa: N802
        """Mean over windows that are chosen to give `size`."""
        return paddle.nn.AdaptiveAvgPool2D(size)

    @staticmethod
    def Flatten(start: int = 1) -> Any:  # noqa: N802
        """A layer that joins the axes from `start` on."""
        return paddle.nn.Flatten(start)

    @staticmethod
    def relu(x: Tensor) -> Tensor:
        """Larger of x and 0."""
        return paddle.nn.functional.relu(x)

    @staticmethod
    def flatten(x: Tensor, start: int = 1) -> Tensor:
        """Axes from `start` on joined."""
        return paddle.flatten(x, start)

    @staticmethod
    def concat(xs: Sequence[Tensor], axis: int = 1) -> Tensor:
        """Tensors joined along an axis."""
        return paddle.concat(list(xs), axis=axis)

    @staticmethod
    def split(x: Tensor, sizes: Sequence[int], axis: int = 1) -> list[Tensor]:
        """Pieces of the given sizes along an axis."""
        return list(paddle.split(x, list(sizes), axis=axis))

    @staticmethod
    def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same entries in another shape; one size may be -1."""
        return paddle.reshape(x, list(shape))

    @staticmethod
    def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
        """Axes in the order of `perm`."""
        return paddle.transpose(x, list(perm))

    @staticmethod
    def mean(x: Tensor, axes: int | Sequence[int], keepdims: bool = False) -> Tensor:
        """Mean over axes."""
        return paddle.mean(x, axis=axes if isinstance(axes, int) else list(axes), keepdim=keepdims)
