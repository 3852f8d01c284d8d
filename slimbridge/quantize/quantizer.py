"""Static quantization: observe activations, decide the grids, apply them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import QuantizeDecision, QuantParams, Skipped
from slimbridge.errors import ModelError, SlimbridgeError, listed, nearest
from slimbridge.plan.registries import OBSERVERS, Observer
from slimbridge.plan.schema import QuantizeStage
from slimbridge.ports import Array, Backend, Layer, Model
from slimbridge.quantize.grid import symmetric_limit, symmetric_step, to_integers, to_reals

QUANTIZABLE = ("conv", "linear")


class Quantizer:
    """Carries out one quantize stage. `observe` and `apply` use a backend, `decide` is neutral."""

    def __init__(self, stage: QuantizeStage) -> None:
        self.stage = stage

    def chosen(self, layers: Sequence[Layer]) -> tuple[list[Layer], tuple[Skipped, ...]]:
        """The layers to quantize and those left in float.

        Raises:
            ModelError: a pattern of ignored_layers matches nothing, or no layer is left.
        """
        candidates = [layer for layer in layers if layer.kind in QUANTIZABLE and "weight" in layer.params]
        paths = [layer.path for layer in candidates]
        for pattern in self.stage.ignored_layers:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ModelError(
                    f"ignored_layers: '{pattern}' matches none of the {len(paths)} convolution and linear layers"
                    f"{nearest(pattern, paths)}; they are: {listed(paths)}"
                )
        skipped = {p for p in paths if any(fnmatchcase(p, pattern) for pattern in self.stage.ignored_layers)}
        chosen = [layer for layer in candidates if layer.path not in skipped]
        if not chosen:
            raise ModelError(
                f"nothing to quantize: {len(candidates)} convolution and linear layers found, {len(skipped)} ignored"
            )
        return chosen, tuple(Skipped(layer=path, reason="ignored_layers names it") for path in sorted(skipped))

    def observe(
        self, backend: Backend, model: Model, layers: Sequence[Layer], batches: Iterable[Sequence[Array]]
    ) -> dict[str, float]:
        """Run calibration batches; layer path -> threshold of its input.

        Raises:
            ModelError: an activation is not finite.
            SlimbridgeError: there is no batch.
        """
        observers: dict[str, Observer] = {}
        paths = [layer.path for layer in layers]
        count = 0
        for count, inputs in enumerate(batches, start=1):
            for path, extremes in backend.reduce(model, inputs, paths).items():
                if not isfinite(extremes["absmax"]):
                    raise ModelError(f"calibration batch {count}: the input of layer '{path}' is not finite")
                if path not in observers:
                    observers[path] = self.new_observer()
                observers[path].update(extremes)
        if not count:
            raise SlimbridgeError("calibration: the training data gave no batch")
        return {path: observer.threshold() for path, observer in observers.items()}

    def new_observer(self) -> Observer:
        """An observer for one tensor; SlimbridgeError for an option that it does not have."""
        make = OBSERVERS.get(self.stage.observer)
        options = self.stage.observer_options
        allowed = list(inspect.signature(make).parameters)
        for name in options:
            if name not in allowed:
                raise SlimbridgeError(
                    f"observer '{self.stage.observer}' has no option '{name}'{nearest(name, allowed)}; "
                    f"allowed: {listed(allowed)}"
                )
        try:
            return make(**options)
        except TypeError as error:
            raise SlimbridgeError(f"observer '{self.stage.observer}': {options}: {error}") from error

    def decide(
        self, layers: Sequence[Layer], weights: Mapping[str, Array], thresholds: Mapping[str, float]
    ) -> QuantizeDecision:
        """The grids: symmetric, per output channel for weights, per tensor for activations.

        Args:
            layers: all layers of the model, in order.
            weights: canonical name -> array.
            thresholds: layer path -> largest magnitude of its input, real units, as `observe` gives it.

        Raises:
            ModelError: nothing to quantize, or a weight is not finite.
        """
        chosen, skipped = self.chosen(layers)
        unused = [layer.path for layer in chosen if layer.path not in thresholds]
        chosen = [layer for layer in chosen if layer.path in thresholds]
        if not chosen:
            raise ModelError(f"nothing to quantize: the calibration ran none of {len(unused)} layers")
        reason = "the calibration batches did not run it"
        return QuantizeDecision(
            observer=self.stage.observer,
            weights={layer.params["weight"]: self._weight_grid(layer, weights) for layer in chosen},
            activations={layer.path: self._grid(np.asarray(thresholds[layer.path]), None) for layer in chosen},
            skipped=skipped + tuple(Skipped(layer=path, reason=reason) for path in unused),
        )

    def apply(self, backend: Backend, model: Model, decision: QuantizeDecision) -> Model:
        """Fake-quantize activations from now on, and write the weights that int8 can hold."""
        integers = integer_weights(decision, backend.read(model))
        model = backend.write(model, real_weights(decision, integers), partial=True)
        return backend.insert_quant(model, decision)

    def _weight_grid(self, layer: Layer, weights: Mapping[str, Array]) -> QuantParams:
        weight = weights[layer.params["weight"]]
        if not np.isfinite(weight).all():
            bad = int(weight.size - np.isfinite(weight).sum())
            raise ModelError(f"layer '{layer.path}': {bad} of {weight.size} entries of its weight are not finite")
        return self._grid(np.abs(weight).reshape(weight.shape[0], -1).max(axis=1), 0)

    def _grid(self, threshold: Array, axis: int | None) -> QuantParams:
        bits = self.stage.activation_bits if axis is None else self.stage.weight_bits
        step = symmetric_step(threshold, bits)
        limit = symmetric_limit(bits)
        return QuantParams(step=tuple(step.reshape(-1).tolist()), low=-limit, high=limit, axis=axis)


def integer_weights(decision: QuantizeDecision, weights: Mapping[str, Array]) -> dict[str, NDArray[np.int8]]:
    """The int8 weights of a decision: canonical name -> array, shapes as in `weights`."""
    return {name: to_integers(weights[name], grid) for name, grid in decision.weights.items()}


def real_weights(decision: QuantizeDecision, integers: Mapping[str, NDArray[np.int8]]) -> dict[str, Array]:
    """The float32 values that int8 weights stand for."""
    return {name: to_reals(integers[name], grid) for name, grid in decision.weights.items()}
