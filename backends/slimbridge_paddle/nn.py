"""The layers of `slimbridge.ports.Backend.nn`, by PyTorch's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from slimbridge.ports import Array, Tensor


class Hardsigmoid(paddle.nn.Layer):
    """min(max(x + 3, 0), 6) / 6; the layer of Paddle 3.3 has a slope of 0.1666667, 2e-7 more than a sixth."""

    def forward(self, x: Tensor) -> Tensor:
        """Shape kept, values in 0..1."""
        return paddle.nn.functional.relu6(x + 3.0) / 6.0


class Namespace:
    """Layer factories and functions under PyTorch's names, so that a model is written once."""

    Module: Any = paddle.nn.Layer
    Sequential: Any = paddle.nn.Sequential
    ModuleList: Any = paddle.nn.LayerList
    ReLU: Any = paddle.nn.ReLU
    ReLU6: Any = paddle.nn.ReLU6
    SiLU: Any = paddle.nn.Silu
    Sigmoid: Any = paddle.nn.Sigmoid
    Hardswish: Any = paddle.nn.Hardswish
    Hardsigmoid: Any = Hardsigmoid
    Identity: Any = paddle.nn.Identity
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
        dilation: int = 1,
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
            dilation=dilation,
            groups=groups,
            bias_attr=None if bias else False,
        )

    @staticmethod
    def ConvTranspose2d(  # noqa: N802
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        output_padding: int = 0,
        groups: int = 1,
        bias: bool = True,
    ) -> Any:
        """A transposed convolution, weight (in, out / groups, height, width).

        Each spatial size becomes (size - 1) * stride - 2 * padding + kernel_size + output_padding.
        """
        return paddle.nn.Conv2DTranspose(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias_attr=None if bias else False,
        )

    @staticmethod
    def LayerNorm(size: int | Sequence[int], eps: float = 1e-5) -> Any:  # noqa: N802
        """Normalises the last axes, whose sizes are given, with scale and shift."""
        return paddle.nn.LayerNorm(size if isinstance(size, int) else list(size), epsilon=eps)

    @staticmethod
    def GroupNorm(num_groups: int, num_channels: int, eps: float = 1e-5) -> Any:  # noqa: N802
        """Normalises each group of channels (axis 1), with a scale and shift for each channel."""
        return paddle.nn.GroupNorm(num_groups, num_channels, epsilon=eps)

    @staticmethod
    def LeakyReLU(slope: float = 0.01) -> Any:  # noqa: N802
        """Entries below 0 times `slope`, the others as they are."""
        return paddle.nn.LeakyReLU(slope)

    @staticmethod
    def GELU() -> Any:  # noqa: N802
        """The input times its normal distribution function, exact."""
        return paddle.nn.GELU()

    @staticmethod
    def BatchNorm2d(channels: int, eps: float = 1e-5, momentum: float = 0.1) -> Any:  # noqa: N802
        """Normalises each channel; `momentum` is the share of the running statistics that a step updates."""
        return paddle.nn.BatchNorm2D(channels, momentum=1 - momentum, epsilon=eps)

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
    def sigmoid(x: Tensor) -> Tensor:
        """1 / (1 + exp(-x))."""
        return paddle.nn.functional.sigmoid(x)

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        """The input times its normal distribution function, exact."""
        return paddle.nn.functional.gelu(x)

    @staticmethod
    def softmax(x: Tensor, axis: int) -> Tensor:
        """Exponentials divided by their sum over one axis."""
        return paddle.nn.functional.softmax(x, axis=axis)

    @staticmethod
    def matmul(a: Tensor, b: Tensor) -> Tensor:
        """Matrix product over the last two axes, the others broadcast."""
        return paddle.matmul(a, b)

    @staticmethod
    def upsample(x: Tensor, factor: int) -> Tensor:
        """NCHW with each pixel repeated `factor` times along both spatial axes."""
        return paddle.nn.functional.interpolate(x, scale_factor=factor, mode="nearest")

    @staticmethod
    def pad(x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Zeros around x: one (before, after) pair for each of the last len(pairs) axes, in order."""
        padded = [(0, 0)] * (len(x.shape) - len(pairs)) + list(pairs)
        # A list of two numbers for every axis is read from the first axis on.
        return paddle.nn.functional.pad(x, [number for pair in padded for number in pair])

    @staticmethod
    def parameter(array: Array) -> Any:
        """A trainable float32 parameter with these values, to be set as an attribute of a Module."""
        values = np.asarray(array, np.float32)
        start = paddle.nn.initializer.Assign(values)
        return paddle.create_parameter(list(values.shape), "float32", default_initializer=start)

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
