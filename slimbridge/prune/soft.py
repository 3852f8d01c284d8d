"""Soft filter pruning: before each epoch the least important filters are zeroed, and then train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from slimbridge.decisions import PruneDecision
from slimbridge.ports import Array, Backend, Layer, Model, Optimizer


def zeroed_filters(weights: Mapping[str, Array], decision: PruneDecision, layers: Sequence[Layer]) -> dict[str, Array]:
    """The weights and biases of the decided channel groups' layers, with the rows of removed output channels 0.

    Only what makes a channel is zeroed. Were the normalisation after it and the weights that read it zero as well,
    the gradient of each would be a product with another zero, and the channel could never come back.

    Args:
        weights: canonical name -> array.
        decision: the channels.
        layers: of the model.

    Returns:
        the arrays that change.
    """
    chosen = {path for group in decision.groups if group.removed for path in group.layers}
    result: dict[str, Array] = {}
    for layer in layers:
        if layer.path not in chosen:
            continue
        for role in ("weight", "bias"):
            name = layer.params.get(role, "")
            axis = 1 if role == "weight" and layer.kind == "conv_transpose" else 0
            kept = decision.kept.get(name, {}).get(axis)
            if kept is not None:
                gone = np.setdiff1d(np.arange(weights[name].shape[axis]), kept)
                result[name] = weights[name].copy()
                np.moveaxis(result[name], axis, 0)[gone] = 0
    return result


class SoftPruning:
    """A callback before each training step that zeroes filters at the first step of each epoch.

    Source: He et al. 2018, "Soft Filter Pruning for Accelerating Deep CNNs", algorithm 1; there the filters are
    zeroed after each epoch. Here the last epoch is followed by the removal, which decides anew.

    Args:
        backend: of the model.
        decide: from the weights to the channels that would go.
    """

    def __init__(self, backend: Backend, decide: Callable[[Mapping[str, Array]], PruneDecision]) -> None:
        self.backend, self.decide = backend, decide

    def __call__(self, model: Model, optimizer: Optimizer, step: int, steps_per_epoch: int) -> None:
        """Zero the filters if an epoch begins."""
        if step % steps_per_epoch == 0:
            weights = self.backend.read(model)
            arrays = zeroed_filters(weights, self.decide(weights), self.backend.layers(model))
            self.backend.write(model, arrays, partial=True)
