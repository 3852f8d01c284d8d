"""Importances: how much an output channel matters, from its layer's weight alone. All in float64."""

from __future__ import annotations

import numpy as np

from slimbridge.plan.registries import IMPORTANCES
from slimbridge.ports import Array, as_float64


@IMPORTANCES.register("l1_norm")
def l1_norm(weight: Array) -> Array:
    """Mean magnitude of each filter.

    Source: Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.1, divided by the filter's size as
    in PaddleSlim 2.6.0 (dygraph/prune/l1norm_pruner.py), so that layers of unequal fan-in can be averaged.

    Args:
        weight: shape (out, in, ...).

    Returns:
        float64, shape (out,).
    """
    # abs is exact in any precision; only the mean needs float64.
    return np.asarray(np.abs(weight.reshape(weight.shape[0], -1)).mean(axis=1, dtype=np.float64))


@IMPORTANCES.register("l2_norm")
def l2_norm(weight: Array) -> Array:
    """Euclidean norm of each filter.

    Source: He et al. 2018, "Soft Filter Pruning", equation 2 with p = 2.

    Args:
        weight: shape (out, in, ...).

    Returns:
        float64, shape (out,).
    """
    rows = as_float64(weight).reshape(weight.shape[0], -1)
    return np.asarray(np.sqrt(np.square(rows).sum(axis=1)))
