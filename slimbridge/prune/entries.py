"""Importances of single entries of a weight, for masks. All in float64; the least important entries are zeroed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from slimbridge.errors import SlimbridgeError
from slimbridge.plan.registries import ENTRY_IMPORTANCES, EntryImportance, Needs, Rows
from slimbridge.ports import Array, as_float64

Score = Callable[..., Array]


def _entry_importance(name: str, needs: Needs = "weights", source: str = "") -> Callable[[Score], Score]:
    def add(score: Score) -> Score:
        ENTRY_IMPORTANCES.register(name)(EntryImportance(score, needs, source))
        return score

    return add


@_entry_importance("magnitude", source="Han et al. 2015, section 3; torch.nn.utils.prune.l1_unstructured")
def magnitude(rows: Rows, p: float = 1.0) -> Array:
    """|w| ** p, what training left small.

    Source: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", section 3.

    Args:
        rows: the weight.
        p: above 0; it orders filters and blocks only, whose entries are averaged: 1 is their L1 norm, 2 their L2.

    Raises:
        SlimbridgeError: p is not above 0.
    """
    if not p > 0:
        raise SlimbridgeError(f"entry importance 'magnitude': p must be above 0, found {p!r}")
    sizes = np.abs(as_float64(rows.weight))
    return sizes if p == 1 else np.asarray(sizes**p)


@_entry_importance("taylor", needs="gradients", source="Molchanov et al. 2019, equation 8")
def taylor(rows: Rows) -> Array:
    """|w * g|, the first-order change of the loss when the entry becomes 0; g is its mean gradient.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8 before squaring.
    """
    return _first_order(rows)


@_entry_importance("snip", needs="gradients", source="Lee et al. 2019 (SNIP), section 4.1")
def snip(rows: Rows) -> Array:
    """|w * g|, the sensitivity of the loss to the entry's connection, meant for weights before training.

    Source: Lee et al. 2019, "SNIP: Single-shot Network Pruning", section 4.1: the derivative by a factor c = 1 of
    the weight is w * g. The paper divides by the sum over the whole network, one number for all entries, which
    changes no order in or between layers: it is left out.
    """
    return _first_order(rows)


def _first_order(rows: Rows) -> Array:
    assert rows.gradient is not None, "collected, since the importance needs it"
    return np.asarray(np.abs(as_float64(rows.weight) * as_float64(rows.gradient)))


@_entry_importance("fisher", needs="squared_gradients", source="LeCun et al. 1990 (OBD), section 2; Theis et al. 2018")
def fisher(rows: Rows) -> Array:
    """0.5 * w ** 2 * h, the second-order change of the loss when the entry becomes 0.

    Source: LeCun et al. 1990, "Optimal Brain Damage", the saliency of section 2; the diagonal h of the Hessian is
    that of the empirical Fisher information (Theis et al. 2018), the mean squared gradient over the batches.
    """
    assert rows.squared_gradient is not None, "collected, since the importance needs it"
    return np.asarray(0.5 * np.square(as_float64(rows.weight)) * as_float64(rows.squared_gradient))


@_entry_importance("lamp", source="Lee et al. 2021 (LAMP), the score of section 3")
def lamp(rows: Rows) -> Array:
    """Share: w ** 2 over the sum of the squares of the layer's entries that are not smaller, itself among them.

    The order in a layer is that of the magnitude; between layers, one entry that outweighs its layer is kept.

    Source: Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", the LAMP score of section 3.
    As there, of equal entries the one with the lower index counts as the smaller.
    """
    squares = np.square(as_float64(rows.weight)).ravel()
    order = np.argsort(squares, kind="stable")
    ascending = squares[order]
    not_smaller = np.cumsum(ascending[::-1])[::-1]
    scores = np.empty_like(squares)
    scores[order] = np.divide(ascending, not_smaller, out=np.zeros_like(squares), where=not_smaller > 0)
    return np.asarray(scores.reshape(rows.weight.shape))


@_entry_importance("random", source="the usual control")
def random(rows: Rows) -> Array:
    """Uniform numbers in 0..1 that depend on the seed, the parameter's name and its shape."""
    stream = np.random.default_rng([rows.seed, *rows.parameter.encode()])
    return np.asarray(stream.random(rows.weight.shape))
