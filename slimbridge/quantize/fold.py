"""BatchNorm folding: the scale of a BatchNorm goes into the weights before it, its parameters stay as a bias."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import Fold
from slimbridge.graph import Graph, Node
from slimbridge.ports import Array, as_float64

_ROLES = ("weight", "bias", "running_mean", "running_var")


def find_folds(graph: Graph, weights: Collection[str]) -> tuple[Fold, ...]:
    """The BatchNorms that can go into the layer before them, in the order of the graph.

    The layer must run once and be read by the BatchNorm alone, which must run once and have all its parameters.

    Args:
        graph: of the model.
        weights: canonical names of the weights that may take one in.
    """
    read: dict[int, int] = {}
    for tensor in (*(t for node in graph.nodes for t in node.inputs), *graph.outputs):
        read[tensor] = read.get(tensor, 0) + 1
    runs: dict[str, int] = {}
    for name in (name for node in graph.nodes for name in set(node.params.values())):
        runs[name] = runs.get(name, 0) + 1
    makers = {node.outputs[0]: node for node in graph.nodes if node.kind in ("conv", "linear")}
    found = []
    for norm in graph.nodes:
        layer = makers.get(norm.inputs[0]) if norm.kind == "batch_norm" else None
        if layer is None or read[norm.inputs[0]] != 1 or layer.attrs.get("transposed"):
            continue
        if any(runs[name] != 1 for node in (layer, norm) for name in node.params.values()):
            continue
        if layer.params["weight"] in weights and all(role in norm.params for role in _ROLES) and "eps" in norm.attrs:
            found.append(_fold(layer, norm))
    return tuple(found)


def _fold(layer: Node, norm: Node) -> Fold:
    return Fold(
        weight=layer.params["weight"],
        bias=layer.params.get("bias"),
        scale=norm.params["weight"],
        shift=norm.params["bias"],
        mean=norm.params["running_mean"],
        variance=norm.params["running_var"],
        eps=float(norm.attrs["eps"]),
    )


def fold_factor(fold: Fold, weights: Mapping[str, Array]) -> NDArray[np.float64]:
    """The factor scale / sqrt(variance + eps) for each output channel, shape (channels,).

    Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", equation 14.
    """
    scale, variance = as_float64(weights[fold.scale]), as_float64(weights[fold.variance])
    with np.errstate(divide="ignore", invalid="ignore"):  # whoever uses the weights looks whether they are finite
        return np.asarray(scale / np.sqrt(variance + fold.eps))


def fold_weights(weights: Mapping[str, Array], folds: tuple[Fold, ...]) -> dict[str, Array]:
    """The parameters that folding changes, computed in float64 and rounded once to their own type.

    The BatchNorm becomes scale 1, mean 0, variance 1 - eps and the bias that is left of it.

    Args:
        weights: canonical name -> array, of the whole model.
        folds: as `find_folds` gives them.
    """
    changed: dict[str, Array] = {}
    for fold in folds:
        factor = fold_factor(fold, weights)
        weight = as_float64(weights[fold.weight])
        bias = as_float64(weights[fold.bias]) if fold.bias else 0.0
        new = {
            fold.weight: weight * factor.reshape(-1, *[1] * (weight.ndim - 1)),
            fold.shift: as_float64(weights[fold.shift]) + (bias - as_float64(weights[fold.mean])) * factor,
            fold.scale: np.ones_like(factor),
            fold.mean: np.zeros_like(factor),
            fold.variance: np.full_like(factor, 1 - fold.eps),
        }
        if fold.bias:
            new[fold.bias] = np.zeros_like(factor)
        with np.errstate(over="ignore", invalid="ignore"):
            changed.update({name: array.astype(weights[name].dtype) for name, array in new.items()})
    return changed
