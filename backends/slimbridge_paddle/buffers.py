"""NumPy arrays on the memory of Paddle tensors, and pieces of them that fit a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import paddle

from slimbridge.ports import Array
from slimbridge_paddle.tensors import dtype_name

Block: TypeAlias = tuple[slice, slice, slice]

BLOCK = 1 << 17
"""Entries that are worked on at once: several passes over them cost little more than one over the whole memory."""


class _Memory:
    """The memory of a contiguous tensor on the CPU, which it keeps alive; see NumPy's array interface, version 3."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "shape": tuple(int(size) for size in tensor.shape),
            "typestr": np.dtype(dtype_name(tensor)).str,
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def view(tensor: Any) -> Array:
    """A contiguous tensor of the CPU as an array on the same memory; writes go to the tensor unseen by autograd."""
    if 0 in tensor.shape:
        return np.empty(tuple(tensor.shape), dtype_name(tensor))
    return np.asarray(_Memory(tensor))


def on_cpu(tensor: Any) -> bool:
    """Is it in the memory that NumPy can see?"""
    return bool(tensor.place.is_cpu_place())


def around(shape: Sequence[int], axis: int | None) -> tuple[int, int, int]:
    """Sizes before, at and after an axis; all is after where there is none."""
    if axis is None:
        return 1, 1, prod(shape)
    axis %= len(shape)
    return prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])


def blocks(sizes: tuple[int, int, int]) -> Iterator[Block]:
    """Slices that cover an array of three axes, of at most `BLOCK` entries each, without gaps in its memory."""
    last = max(1, min(sizes[2], BLOCK))
    middle = max(1, min(sizes[1], BLOCK // last))
    first = max(1, min(sizes[0], BLOCK // (last * middle)))
    for i in range(0, sizes[0], first):
        for j in range(0, sizes[1], middle):
            for k in range(0, sizes[2], last):
                yield slice(i, i + first), slice(j, j + middle), slice(k, k + last)


def extremes(values: Array) -> tuple[Array, Array]:
    """Smallest and largest entry for each index of the middle of three axes, NaN where one is; each entry read once."""
    low = np.full(values.shape[1], np.inf, values.dtype)
    high = np.full(values.shape[1], -np.inf, values.dtype)
    for block in blocks((values.shape[0], values.shape[1], values.shape[2])):
        part = values[block]
        axes = (2, 0) if part.shape[2] > 1 else (0, 1)  # first where the entries lie side by side
        for found, reduced in ((low, np.minimum), (high, np.maximum)):
            own = found[block[1]]
            reduced(own, reduced.reduce(reduced.reduce(part, axes[0]), axes[1]), out=own)
    return low, high


def contiguous(tensor: Any) -> Any:
    """The tensor itself, or a copy without gaps."""
    return tensor if tensor.is_contiguous() else paddle.Tensor.contiguous(tensor)
