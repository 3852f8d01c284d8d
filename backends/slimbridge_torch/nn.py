"""Layers and functions by the names that the zoo uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn
from torch.nn import functional

Tensor = Any

Module = nn.Module
Sequential = nn.Sequential
ModuleList = nn.ModuleList
Conv2d = nn.Conv2d
ConvTranspose2d = nn.ConvTranspose2d
Linear = nn.Linear
BatchNorm2d = nn.BatchNorm2d
LayerNorm = nn.LayerNorm
GroupNorm = nn.GroupNorm
ReLU = nn.ReLU
ReLU6 = nn.ReLU6
LeakyReLU = nn.LeakyReLU
GELU = nn.GELU
SiLU = nn.SiLU
Sigmoid = nn.Sigmoid
Hardswish = nn.Hardswish
Hardsigmoid = nn.Hardsigmoid
MaxPool2d = nn.MaxPool2d
AvgPool2d = nn.AvgPool2d
AdaptiveAvgPool2d = nn.AdaptiveAvgPool2d
Dropout = nn.Dropout
Flatten = nn.Flatten
Identity = nn.Identity


def relu(x: Tensor) -> Tensor:
    """Larger of x and 0."""
    return torch.relu(x)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """X times the normal distribution function of x, exact (no tanh approximation)."""
    return functional.gelu(x)


def softmax(x: Tensor, axis: int) -> Tensor:
    """Softmax over one axis."""
    return torch.softmax(x, dim=axis)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product over the last two axes, the others broadcast."""
    return torch.matmul(a, b)


def flatten(x: Tensor, start: int = 1) -> Tensor:
    """All axes from `start` on become one."""
    return torch.flatten(x, start)


def concat(xs: Sequence[Tensor], axis: int = 1) -> Tensor:
    """Tensors joined along an axis."""
    return torch.cat(tuple(xs), dim=axis)


def split(x: Tensor, sizes: Sequence[int], axis: int = 1) -> tuple[Tensor, ...]:
    """Pieces of the given sizes along an axis."""
    return tuple(torch.split(x, list(sizes), dim=axis))


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same entries in another shape; one size may be -1."""
    return torch.reshape(x, tuple(shape))


def transpose(x: Tensor, perm: Sequence[int]) -> Tensor:
    """Axes in the order of `perm`."""
    return torch.permute(x, tuple(perm))


def mean(x: Tensor, axes: int | Sequence[int], keepdims: bool = False) -> Tensor:
    """Mean over axes."""
    return torch.mean(x, dim=axes if isinstance(axes, int) else tuple(axes), keepdim=keepdims)


def upsample(x: Tensor, factor: int) -> Tensor:
    """(N, C, H, W) -> (N, C, factor * H, factor * W): each entry repeated (nearest)."""
    return functional.interpolate(x, scale_factor=factor, mode="nearest")


def pad(x: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros around x: one (before, after) pair for each of the last axes."""
    return functional.pad(x, [count for pair in reversed(tuple(pairs)) for count in pair])


def parameter(array: ArrayLike) -> nn.Parameter:
    """A trainable float32 array, to be set as an attribute of a Module."""
    return nn.Parameter(torch.tensor(np.asarray(array, dtype=np.float32)))
