"""Patterns of masks: which entries go together, and which of them go.

An entry's score is its importance. In the patterns "unstructured", "filters" and "block" a weight falls apart into
units (entries, output rows, blocks of its matrix view); a unit is rated by the mean of its entries' scores, and the
least important units go: round(n * sparsity) of n, half to even, as in torch.nn.utils.prune; of equal ones the first.
The mean orders units of one size as the sum does, and does not favour the small ones at a ragged edge.
In the pattern "n_m" entries compete in groups of neighbours along the input axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slimbridge.ports import Array, as_float64

Pattern = Literal["unstructured", "block", "n_m", "filters"]
Bools = NDArray[np.bool_]


def mask_of(
    scores: Array,
    pattern: Pattern,
    sparsity: float,
    block: tuple[int, int] = (4, 4),
    n_m: tuple[int, int] = (2, 4),
    held: Bools | None = None,
) -> Bools:
    """The mask of one weight.

    Args:
        scores: shape (out, in, *kernel), 0 or more.
        pattern: "block" cuts the matrix view (out, in * kernel) into blocks of `block` rows and columns, smaller ones
            at the edges; "n_m" see `n_m_mask`.
        sparsity: share of the units that go, 0..1; not used by "n_m".
        block: rows and columns.
        n_m: how many stay, of how many.
        held: entries that are False are zero already: they stay so, and go first.

    Returns:
        True = stays, the shape of `scores`.
    """
    if pattern == "n_m":
        return n_m_mask(scores, n_m, held)
    return masks_of([scores], pattern, sparsity, block, [held])[0]


def masks_of(
    scores: Sequence[Array],
    pattern: Pattern,
    sparsity: float,
    block: tuple[int, int] = (4, 4),
    held: Sequence[Bools | None] | None = None,
) -> list[Bools]:
    """Masks of several weights whose units compete with each other; see `mask_of`.

    Raises:
        ValueError: the pattern is "n_m", where nothing competes between layers.
    """
    if pattern == "n_m":
        raise ValueError("pattern n_m has no choice between layers")
    before = list(held) if held is not None else [None] * len(scores)
    rated = [_rated(values, pattern, block, mask) for values, mask in zip(scores, before, strict=True)]
    every = np.concatenate(rated)
    keep = ~lowest(every, round(every.size * sparsity))
    cuts = np.cumsum([units.size for units in rated])[:-1]
    parts = zip(np.split(keep, cuts), scores, strict=True)
    masks = [_spread(part, values.shape, pattern, block) for part, values in parts]
    return [mask if old is None else mask & old for mask, old in zip(masks, before, strict=True)]


def lowest(values: NDArray[np.float64], count: int) -> Bools:
    """Marks the `count` smallest of the values, of equal ones those that come first; shape (n,)."""
    if count <= 0:
        return np.zeros(values.size, dtype=bool)
    threshold = np.partition(values, count - 1)[count - 1]
    marked = np.asarray(values < threshold)
    marked[np.flatnonzero(values == threshold)[: count - int(marked.sum())]] = True
    return marked


def n_m_mask(scores: Array, n_m: tuple[int, int], held: Bools | None = None) -> Bools:
    """N of M neighbours along the input axis stay, for each output and each position of the kernel.

    So NVIDIA's ASP (apex.contrib.sparsity, pattern m4n2_1d) reads a convolution: its kernels multiply over input
    channels. For a linear layer the neighbours lie along in_features.

    Args:
        scores: shape (out, in, *kernel); `in` is a multiple of M.
        n_m: N and M.
        held: entries that are False are zero already, and go first.

    Raises:
        ValueError: `in` is not a multiple of M.
    """
    stay, of = n_m
    if scores.shape[1] % of:
        raise ValueError(f"{scores.shape[1]} input channels are no multiple of {of}")
    rated = as_float64(scores) if held is None else np.where(held, as_float64(scores), -1.0)
    last = np.moveaxis(rated, 1, -1)
    groups = last.reshape(-1, of)
    keep = np.ones(groups.shape, dtype=bool)
    np.put_along_axis(keep, np.argsort(groups, axis=1, kind="stable")[:, : of - stay], False, axis=1)
    mask = np.ascontiguousarray(np.moveaxis(keep.reshape(last.shape), -1, 1))
    return mask if held is None else mask & held


def _rated(scores: Array, pattern: Pattern, block: tuple[int, int], held: Bools | None) -> NDArray[np.float64]:
    """The score of each unit, shape (units,); -1 for those that are zero already."""
    if held is None:
        return _means(as_float64(scores), pattern, block)
    means = _means(np.where(held, as_float64(scores), 0.0), pattern, block)
    return np.where(_means(as_float64(held), pattern, block) > 0, means, -1.0)


def _means(values: NDArray[np.float64], pattern: Pattern, block: tuple[int, int]) -> NDArray[np.float64]:
    if pattern == "unstructured":
        return values.ravel()
    matrix = values.reshape(values.shape[0], -1)
    if pattern == "filters":
        return np.asarray(matrix.mean(axis=1))
    starts = [np.arange(0, size, step) for size, step in zip(matrix.shape, block, strict=True)]
    sums = np.add.reduceat(np.add.reduceat(matrix, starts[0], axis=0), starts[1], axis=1)
    sizes = [np.diff(start, append=size) for start, size in zip(starts, matrix.shape, strict=True)]
    return np.asarray((sums / np.outer(*sizes)).ravel())


def _spread(keep: Bools, shape: tuple[int, ...], pattern: Pattern, block: tuple[int, int]) -> Bools:
    """From units back to entries."""
    if pattern == "unstructured":
        return keep.reshape(shape)
    rows, columns = shape[0], int(np.prod(shape[1:]))
    if pattern == "filters":
        return np.repeat(keep, columns).reshape(shape)
    grid = keep.reshape(-(-rows // block[0]), -1)
    wide = np.repeat(np.repeat(grid, block[0], axis=0)[:rows], block[1], axis=1)[:, :columns]
    return wide.reshape(shape)
