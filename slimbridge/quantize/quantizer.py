"""The quantizer: which layers and tensors, the grids that are decided for them, and how they are applied."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import DynamicGrid, Fold, QuantizeDecision, QuantParams, Site, Skipped
from slimbridge.errors import ModelError, SlimbridgeError, listed, nearest
from slimbridge.graph import Graph
from slimbridge.plan.quantizing import QuantizeStage
from slimbridge.plan.registries import OBSERVERS, Observer, Scheme
from slimbridge.ports import Array, Backend, FakeQuant, Layer, Model
from slimbridge.quantize.fake import Dynamic, Static
from slimbridge.quantize.fold import find_folds, fold_weights
from slimbridge.quantize.grid import grid_of, limits_of, to_integers, to_reals
from slimbridge.quantize.placement import Placement, place_full, place_layers
from slimbridge.quantize.targets import FOLDED, Target, find_targets, require_finite


class Quantizer:
    """Decides one quantize stage for one model.

    Args:
        stage: of the plan.
        layers: all layers of the model, in order of definition.
        graph: of the model.

    Attributes:
        observed: calibration batches that `observe` was given.

    Raises:
        ModelError: a pattern of ignored_layers matches nothing, or nothing is left to quantize.
    """

    def __init__(self, stage: QuantizeStage, layers: Sequence[Layer], graph: Graph) -> None:
        self.stage, self.graph = stage, graph
        self.observed = 0
        self.targets, self._skipped = find_targets(stage, layers, graph)

    @cached_property
    def folds(self) -> tuple[Fold, ...]:
        """The BatchNorms that go into the weights of the targets."""
        return find_folds(self.graph, {target.weight for target in self.targets}) if self.stage.fold_batch_norm else ()

    @cached_property
    def placement(self) -> Placement:
        """The tensors that need a grid, for mode static.

        Raises:
            ModelError: the trace saw no module calls, which placement full rests on.
        """
        paths = [target.path for target in self.targets]
        if self.stage.placement == "layer":
            return place_layers(paths)
        if not self.graph.calls:
            raise ModelError(
                "placement full: the model could be traced only as a whole, without its module calls, so that tensors\n"
                "between layers cannot be reached; allowed for this model: placement layer"
            )
        return place_full(self.graph, paths, self.folds)

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """What is left in float, and why."""
        lost = self.placement.skipped if self.stage.mode == "static" else ()
        return (*self._skipped, *lost)

    def weight_bits(self, path: str) -> int:
        """Word length of a layer's weight."""
        return 8 if path in self._eight else self.stage.weight_bits

    def scheme(self, site: Site) -> Scheme:
        """How an activation's integers stand for reals."""
        eight = any(site in self.placement.reads.get(path, ()) for path in self._eight)
        bits = 8 if eight else self.stage.activation_bits
        return Scheme(bits, self.stage.activation_scheme == "symmetric", False, self.stage.definition)

    @cached_property
    def _eight(self) -> frozenset[str]:
        ends = (self.targets[0].path, self.stage.first_layer), (self.targets[-1].path, self.stage.last_layer)
        return frozenset(path for path, word in ends if word == "8bit")

    def observe(self, backend: Backend, model: Model, batches: Iterable[Sequence[Array]]) -> dict[Site, Observer]:
        """Run calibration batches; site -> its observer. A site that never ran is absent.

        Raises:
            ModelError: a tensor is not finite.
            SlimbridgeError: there is no batch.
        """
        observers: dict[Site, Observer] = {}
        needs = new_observer(self.stage).needs_histogram
        count = 0
        for count, inputs in enumerate(batches, start=1):
            for site, found in backend.reduce(model, inputs, self.placement.sites, needs).items():
                if not isfinite(found.absmax):
                    raise ModelError(f"calibration batch {count}: the tensor '{site}' is not finite")
                observers.setdefault(site, new_observer(self.stage)).update(found)
        self.observed = count
        if not count:
            raise SlimbridgeError("calibration: the training data gave no batch")
        return observers

    def decide(self, weights: Mapping[str, Array], observers: Mapping[Site, Observer]) -> QuantizeDecision:
        """The grids.

        Args:
            weights: canonical name -> array, before folding.
            observers: of the activations, for mode static.

        Raises:
            ModelError: a weight is not finite.
        """
        return self.decision(self.weight_grids(weights), self.activation_grids(observers))

    def weight_grids(self, weights: Mapping[str, Array]) -> dict[str, QuantParams]:
        """The grids of the targets' weights, folded first; errors as `decide`."""
        folds = {fold.weight: (fold,) for fold in self.folds}
        grids = {}
        for target in self.targets:  # one at a time: folding them all would hold a second copy of the model
            weight = weights[target.weight]
            require_finite(target, weight)
            weight = fold_weights(weights, folds.get(target.weight, ())).get(target.weight, weight)
            require_finite(target, weight, FOLDED)
            grids[target.weight] = self.weight_grid(target, weight)
        return grids

    def activation_grids(self, observers: Mapping[Site, Observer]) -> dict[Site, QuantParams]:
        """The grid of each site that was observed."""
        found = {}
        for site in self.placement.sites if self.stage.mode == "static" else ():
            if site in observers:
                scheme = self.scheme(site)
                low, high = observers[site].limits(scheme)
                found[site] = grid_of(np.asarray(low), np.asarray(high), scheme)
        return found

    def decision(self, weights: Mapping[str, QuantParams], activations: Mapping[Site, QuantParams]) -> QuantizeDecision:
        """The decision of these grids; layers whose input never ran are left out.

        Raises:
            ModelError: nothing is left.
        """
        stage, static = self.stage, self.stage.mode == "static"
        ran = [t for t in self.targets if not static or any(s in activations for s in self.placement.reads[t.path])]
        idle = [target.path for target in self.targets if target not in ran]
        if not ran:
            raise ModelError(f"nothing to quantize: the calibration ran none of {len(idle)} layers")
        dynamic = _dynamic(stage)
        return QuantizeDecision(
            observer=stage.observer if stage.qat is None else f"qat {stage.qat.activation_ranges}",
            mode=stage.mode,
            weights={target.weight: weights[target.weight] for target in ran},
            activations={str(site): grid for site, grid in activations.items()},
            dynamic={target.path: dynamic for target in ran} if stage.mode == "dynamic" else {},
            folds=tuple(fold for fold in self.folds if fold.weight in {target.weight for target in ran}),
            skipped=(
                *self.skipped,
                *(Skipped(layer=path, reason="the calibration batches did not run it") for path in idle),
            ),
        )

    def weight_grid(self, target: Target, weight: Array) -> QuantParams:
        """The grid of a weight as it is given, folded or not."""
        stage = self.stage
        axis = None if stage.weight_granularity == "tensor" else 0
        if stage.group_size is not None and weight[0].size % stage.group_size:
            raise ModelError(
                f"group_size {stage.group_size} does not divide the {weight[0].size} weights of a channel of "
                f"'{target.path}'; ignored_layers can leave the layer out"
            )
        bits, symmetric = self.weight_bits(target.path), stage.weight_scheme == "symmetric"
        scheme = Scheme(bits, symmetric, True, stage.definition)
        low, high = limits_of(weight, axis, stage.group_size)
        return grid_of(low, high, scheme, axis, stage.group_size)


def apply(backend: Backend, model: Model, decision: QuantizeDecision) -> Model:
    """Fold, write the weights that the integers stand for, and fake-quantize activations from now on."""
    weights = backend.read(model)
    folded = fold_weights(weights, decision.folds)
    integers = integer_weights(decision, {**weights, **folded})
    model = backend.write(model, {**folded, **real_weights(decision, integers)}, partial=True)
    return insert(backend, model, decision)


def insert(backend: Backend, model: Model, decision: QuantizeDecision) -> Model:
    """Fake-quantize the decision's activations from now on; the weights are left as they are."""
    quants: dict[Site, FakeQuant] = {}
    for key, grid in decision.activations.items():
        quants[Site.parse(key)] = Static.of(grid, f"quantize '{key}'")
    for key, form in decision.dynamic.items():
        quants[Site.parse(key)] = Dynamic(form)
    return backend.insert_quant(model, quants)


def integer_weights(decision: QuantizeDecision, weights: Mapping[str, Array]) -> dict[str, NDArray[np.int8]]:
    """The integer weights of a decision: canonical name -> int8, shapes as in `weights`, which are folded already."""
    return {name: to_integers(weights[name], grid).astype(np.int8) for name, grid in decision.weights.items()}


def real_weights(decision: QuantizeDecision, integers: Mapping[str, NDArray[np.int8]]) -> dict[str, Array]:
    """The float32 values that integer weights stand for."""
    return {name: to_reals(integers[name], grid) for name, grid in decision.weights.items()}


def new_observer(stage: QuantizeStage) -> Observer:
    """An observer for one tensor; SlimbridgeError for an option that it does not have."""
    make, options = OBSERVERS.get(stage.observer), stage.observer_options
    allowed = list(inspect.signature(make).parameters)
    for name in options:
        if name not in allowed:
            raise SlimbridgeError(
                f"observer '{stage.observer}' has no option '{name}'{nearest(name, allowed)}; "
                f"allowed: {listed(allowed)}"
            )
    try:
        return make(**options)
    except TypeError as error:
        raise SlimbridgeError(f"observer '{stage.observer}': {options}: {error}") from error


def _dynamic(stage: QuantizeStage) -> DynamicGrid:
    bits, symmetric = stage.activation_bits, stage.activation_scheme == "symmetric"
    low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    return DynamicGrid(low=low, high=high, symmetric=symmetric)
