"""Importances: how much a channel matters. Each rates the rows of one coupled parameter; all in float64."""

from __future__ import annotations

from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import SlimbridgeError
from slimbridge.plan.registries import IMPORTANCES, Importance, Rows
from slimbridge.ports import Array, as_float64

Values = NDArray[np.float64]
NEAR = 1e-4
"""A squared distance below this share of the two squared norms is taken from the difference itself."""
BLOCK = 1 << 17
"""Distances that are in memory at once."""
COLUMNS = 512
"""Columns of a weight that are in memory in float64 at once."""


def flat(array: Array) -> Array:
    """Shape (rows, ...) -> (rows, entries of a row)."""
    return array.reshape(array.shape[0], -1)


def l1_norm(rows: Rows) -> Values:
    """Mean magnitude: mean |w|.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1, divided by the filter's size as
    in PaddleSlim 2.6.0 (dygraph/prune/l1norm_pruner.py), so that layers of unequal fan-in can be averaged.

    Args:
        rows: weight of shape (rows, ...).

    Returns:
        float64, shape (rows,).
    """
    # abs is exact in any precision; only the mean needs float64.
    return np.asarray(np.abs(flat(rows.weight)).mean(axis=1, dtype=np.float64))


def l2_norm(rows: Rows) -> Values:
    """Euclidean norm: sqrt(sum w^2).

    Source: He et al. 2018, "Soft Filter Pruning", equation 2 with p = 2; PaddleSlim 2.6.0
    (dygraph/prune/l2norm_pruner.py).

    Args:
        rows: weight of shape (rows, ...).

    Returns:
        float64, shape (rows,).
    """
    return np.asarray(np.sqrt(squares(rows)))


def fpgm(rows: Rows) -> Values:
    """Sum of the Euclidean distances to all other filters: what lies near their geometric median can be replaced.

    Source: He et al. 2019, "Filter Pruning via Geometric Median", equations 4 and 5; PaddleSlim 2.6.0
    (dygraph/prune/fpgm_pruner.py).

    Args:
        rows: weight of shape (rows, ...).

    Returns:
        float64, shape (rows,); equal filters have exactly equal values.
    """
    return distance_sums(flat(rows.weight))


def bn_scale(rows: Rows) -> Values:
    """Magnitude of the BatchNorm scale: |gamma|.

    Source: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", section 3.

    Args:
        rows: scale of shape (rows,).

    Returns:
        float64, shape (rows,).
    """
    return np.asarray(np.abs(as_float64(flat(rows.weight))).sum(axis=1))


def taylor(rows: Rows) -> Values:
    """First-order change of the loss, entry by entry: sum |w g|.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8 with magnitudes for
    squares, summed over a channel's entries as in Torch-Pruning 1.6.1 (GroupTaylorImportance).

    Args:
        rows: weight and mean gradient of shape (rows, ...).

    Returns:
        float64, shape (rows,).
    """
    assert rows.gradient is not None
    return np.asarray(np.abs(as_float64(flat(rows.weight)) * flat(rows.gradient)).sum(axis=1))


def fisher(rows: Rows) -> Values:
    """Second-order change of the loss: sum w^2 h / 2, with the mean squared gradient h (empirical Fisher) as curvature.

    Source: LeCun et al. 1990, "Optimal Brain Damage", equation 5. The gradients are those of batches: with one sample
    a batch h is the empirical Fisher itself, with more it is smaller.

    Args:
        rows: weight and mean squared gradient of shape (rows, ...).

    Returns:
        float64, shape (rows,).
    """
    assert rows.squared_gradient is not None
    return np.asarray(0.5 * (np.square(as_float64(flat(rows.weight))) * flat(rows.squared_gradient)).sum(axis=1))


def squares(rows: Rows) -> Values:
    """Sum of squares of each row, float64, shape (rows,)."""
    values = as_float64(flat(rows.weight))
    return np.asarray(np.einsum("ij,ij->i", values, values))


def group_norm(rows: Rows) -> Values:
    """Euclidean norm over all coupled parameters of a channel: sqrt(sum w^2), biases and normalisations included.

    Source: Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", section 3.3, equation 4.

    Args:
        rows: weight of shape (rows, ...); the sums of squares are added over the rows of a channel, then rooted.

    Returns:
        float64, shape (rows,), the sum of squares.
    """
    return squares(rows)


def magnitude(rows: Rows, p: float = 2.0) -> Values:
    """Sum of the powers of magnitudes, without a root: sum |w|^p.

    Source: Torch-Pruning 1.6.1 (GroupMagnitudeImportance).

    Args:
        rows: weight of shape (rows, ...).
        p: exponent, above 0.

    Returns:
        float64, shape (rows,).
    """
    return np.asarray(powers(rows, p).sum(axis=1))


def powers(rows: Rows, p: float) -> Values:
    """|w|^p in float64, shape (rows, entries); SlimbridgeError where p is not above 0."""
    if not 0 < p < np.inf:
        raise SlimbridgeError(f"importance_options.p: found {p}; allowed: a number above 0")
    sizes = np.abs(as_float64(flat(rows.weight)))
    return sizes if p == 1 else np.asarray(np.square(sizes) if p == 2 else sizes**p)


def lamp(rows: Rows, p: float = 2.0) -> Values:
    """Sum |w|^p of a channel over that of all channels of its group that are no smaller.

    Source: Lee et al. 2021, "Layer-Adaptive Sparsity for the Magnitude-based Pruning", equation 3, for channels as in
    Torch-Pruning 1.6.1 (LAMPImportance). The division is the normalisation "lamp", this importance's own.

    Args:
        rows: weight of shape (rows, ...).
        p: exponent, above 0.

    Returns:
        float64, shape (rows,), before the division.
    """
    return magnitude(rows, p)


def snip(rows: Rows) -> Values:
    """Connection sensitivity: sum |w g| of a channel over the sum of all channels that compete.

    Source: Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", equation 6, summed
    over a channel's connections. The division is the normalisation "total", this importance's own.

    Args:
        rows: weight and mean gradient of shape (rows, ...).

    Returns:
        float64, shape (rows,), before the division.
    """
    return taylor(rows)


def activation_mean(rows: Rows) -> Values:
    """Mean magnitude of the channel's activations over the calibration batches.

    Source: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", section
    2.2 ("activation"), with magnitudes.

    Args:
        rows: activations of shape (rows,), after the normalisation and activation function that follow the layer.

    Returns:
        float64, shape (rows,).
    """
    assert rows.activation is not None
    return as_float64(rows.activation["mean"])


def activation_apoz(rows: Rows) -> Values:
    """One minus the average percentage of zeros (APoZ) of the channel's activations.

    Source: Hu et al. 2016, "Network Trimming", equation 1. It tells channels apart behind a ReLU only.

    Args:
        rows: activations of shape (rows,), after the normalisation and activation function that follow the layer.

    Returns:
        float64, shape (rows,), 0..1.
    """
    assert rows.activation is not None
    return np.asarray(1.0 - as_float64(rows.activation["apoz"]))


def random(rows: Rows) -> Values:
    """Uniform random numbers in [0, 1), drawn from the plan's seed and the parameter's name: the baseline to beat.

    Source: numpy.random.default_rng([seed, CRC-32 of the name]).

    Args:
        rows: only their number, name and seed are used.

    Returns:
        float64, shape (rows,).
    """
    generator = np.random.default_rng([rows.seed, crc32(rows.parameter.encode())])
    return generator.random(rows.weight.shape[0])


def distance_sums(rows: Values) -> Values:
    """Of each row, the sum of its Euclidean distances to all others.

    By d^2 = |a|^2 + |b|^2 - 2 a.b, one matrix product. Equal rows are counted, not compared, so that their distance is
    exactly 0; the mean row is taken off first, and near rows are compared directly, since there the sum cancels.

    Args:
        rows: floating, shape (rows, entries), computed with in float64; what is not finite makes the result so.

    Returns:
        float64, shape (rows,).
    """
    same = _equal_rows(rows)
    distinct = rows if same[-1] == len(rows) - 1 else rows[np.unique(same, return_index=True)[1]]
    counts = np.bincount(same).astype(np.float64)
    gram = np.zeros((len(distinct), len(distinct)))
    for start in range(0, distinct.shape[1], COLUMNS):
        columns = np.array(distinct[:, start : start + COLUMNS], np.float64)
        columns -= columns.mean(axis=0)
        gram += columns @ columns.T
    norms = gram.diagonal().copy()
    sums = np.empty(len(distinct))
    step = max(1, BLOCK // max(len(distinct), 1))
    for start in range(0, len(distinct), step):
        block = slice(start, start + step)
        sums[block] = np.sqrt(_squared_distances(distinct, gram, norms, block)) @ counts
    return np.asarray(sums[same])


def _equal_rows(rows: Values) -> NDArray[np.int64]:
    """By row: the number of its value, 0.. in order of first appearance; only rows of equal sums are compared."""
    _, inverse, count = np.unique(rows.sum(axis=1), return_inverse=True, return_counts=True)
    seen: dict[object, int] = {}
    pairs = enumerate(zip(inverse, rows, strict=True))
    # Adding 0 makes one number of -0 and 0, which are two patterns of bits.
    keys = ((row + 0.0).tobytes() if count[group] > 1 else index for index, (group, row) in pairs)
    return np.array([seen.setdefault(key, len(seen)) for key in keys], np.int64)


def _squared_distances(rows: Values, gram: Values, norms: Values, block: slice) -> Values:
    """Of some rows from all, shape (rows of the block, rows), 0 or more; 0 from themselves."""
    scale = norms[block, None] + norms
    squared = scale - 2 * gram[block]
    own = np.arange(len(squared)), np.arange(block.start, block.start + len(squared))
    near = squared < NEAR * scale
    near[own] = False
    for i, j in np.argwhere(near):
        squared[i, j] = np.square(as_float64(rows[block.start + i]) - rows[j]).sum()
    squared[own] = 0.0
    return np.maximum(squared, 0.0)


for _name, _entry in {
    "l1_norm": Importance(l1_norm, source="Li et al. 2017"),
    "l2_norm": Importance(l2_norm, source="He et al. 2018"),
    "fpgm": Importance(fpgm, source="He et al. 2019"),
    "bn_scale": Importance(bn_scale, rated="norms", source="Liu et al. 2017"),
    "taylor": Importance(taylor, "gradients", group_reduction="sum", source="Molchanov et al. 2019"),
    "fisher": Importance(fisher, "squared_gradients", group_reduction="sum", source="LeCun et al. 1990"),
    "group_norm": Importance(group_norm, rated="coupled", group_reduction="sum", root=2.0, source="Fang et al. 2023"),
    "magnitude": Importance(magnitude, source="Torch-Pruning 1.6.1"),
    "lamp": Importance(lamp, normalisation="lamp", source="Lee et al. 2021"),
    "snip": Importance(snip, "gradients", group_reduction="sum", normalisation="total", source="Lee et al. 2019"),
    "activation_mean": Importance(activation_mean, "activations", source="Molchanov et al. 2017"),
    "activation_apoz": Importance(activation_apoz, "activations", source="Hu et al. 2016"),
    "random": Importance(random, source="a baseline"),
}.items():
    IMPORTANCES.register(_name)(_entry)
