"""What importances need beside the weights: gradients and activations over calibration batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimbridge.ports import Array


@dataclass(frozen=True)
class Evidence:
    """Collected over the calibration batches; empty mappings where an importance needs nothing.

    Attributes:
        gradients: parameter -> mean gradient of the loss, canonical shape.
        squared_gradients: parameter -> mean over the batches of the squared gradient, canonical shape.
        activations: producer's layer path -> {"mean", "apoz"} of each output channel, shape (out,), after the
            normalisation and activation that follow it.
    """

    gradients: Mapping[str, Array] = field(default_factory=dict)
    squared_gradients: Mapping[str, Array] = field(default_factory=dict)
    activations: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
