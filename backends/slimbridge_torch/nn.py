"""Layers and functions by the names that the zoo uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

Tensor = Any

Module = nn.Module
Sequential = nn.Sequential
ModuleList = nn.ModuleList
Conv2d = nn.Conv2d
Linear = nn.Linear
BatchNorm2d = nn.BatchNorm2d
ReLU = nn.ReLU
ReLU6 = nn.ReLU6
MaxPool2d = nn.MaxPool2d
AvgPool2d = nn.AvgPool2d
AdaptiveAvgPool2d = nn.AdaptiveAvgPool2d
Dropout = nn.Dropout
Flatten = nn.Flatten
Identity = nn.Identity


def relu(x: Tensor) -> Tensor:
    """Larger of x and 0."""
    return torch.relu(x)


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
