"""Quantization-aware training: what is inserted before it, how it is steered, and what is decided after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from slimbridge.decisions import Fold, QuantizeDecision, QuantParams, Site
from slimbridge.errors import ModelError
from slimbridge.plan.quantizing import QatSection
from slimbridge.ports import Array, Backend, Model, Optimizer
from slimbridge.quantize.fold import fold_factor, fold_weights
from slimbridge.quantize.formulas import NORMAL
from slimbridge.quantize.grid import to_integers
from slimbridge.quantize.learned import LSQ, PACT, LSQPlus
from slimbridge.quantize.quantizer import Quantizer
from slimbridge.quantize.ranges import AbsMax, Folded, MovingAverage, Trainable
from slimbridge.quantize.targets import FOLDED, Target, require_finite

BeforeStep = Callable[[Model, Optimizer, int, int], None]


class Qat:
    """One quantization-aware training.

    Args:
        quantizer: of a stage with a section qat.
        weights: canonical name -> array, before the training.
        grids: of the activations, from calibration: where their ranges start, and whether they are signed.

    Attributes:
        quants: what is inserted for the training.
    """

    def __init__(self, quantizer: Quantizer, weights: Mapping[str, Array], grids: Mapping[Site, QuantParams]) -> None:
        assert quantizer.stage.qat is not None
        self.quantizer, self.section = quantizer, quantizer.stage.qat
        self.folds = {fold.weight: fold for fold in quantizer.folds}
        for target in quantizer.targets:
            require_finite(target, weights[target.weight])
        self._weights = {target: self._weight(target, weights) for target in quantizer.targets}
        make = _ACTIVATIONS[self.section.activation_ranges]
        self._inputs = {site: make(self, grid, str(site)) for site, grid in grids.items()}

    @property
    def quants(self) -> dict[Site, Trainable]:
        """Site -> its fake quantization."""
        weights = {Site(target.path, "weight"): quant for target, quant in self._weights.items()}
        return {**self._inputs, **weights}

    def steering(self, backend: Backend, epochs: int) -> BeforeStep:
        """What is done before each step: statistics and ranges stay as they are from their time on."""
        section: QatSection = self.section

        def before_step(model: Model, optimizer: Optimizer, number: int, steps: int) -> None:
            done = number / (epochs * steps)
            backend.hold_statistics(model, done >= section.freeze_batch_norm_after)
            for quant in (*self._weights.values(), *self._inputs.values()):
                quant.frozen = done >= section.freeze_ranges_after

        return before_step

    def decide(self, values: Mapping[str, Array]) -> tuple[QuantizeDecision, dict[str, Array]]:
        """The grids that the training ended with, BatchNorm folded in.

        Where the grid is that of the unfolded weight, folding moves the scale of the BatchNorm from the weight to
        its steps: the integers stay, with their sign turned where the scale is negative.

        Args:
            values: all parameters and buffers after the training, those of the fake quantizations among them.

        Returns:
            the decision, and new values for the weights that are to be folded.

        Raises:
            ModelError: the training left a range or a weight that is not finite.
        """
        grids: dict[str, QuantParams] = {}
        real: dict[str, Array] = {}
        for target, quant in self._weights.items():
            require_finite(target, values[target.weight])
            fold = self.folds.get(target.weight)
            weight = values[target.weight]
            if fold is not None:
                folded = fold_weights(values, (fold,))[target.weight]
                require_finite(target, folded, FOLDED)
                weight = folded if self.section.batch_norm == "fold" else weight
            grid = quant.grid({**_held(Site(target.path, "weight"), quant, values), "weight": weight})
            if fold is not None and self.section.batch_norm == "keep":
                grid, real[target.weight] = self._moved(fold, grid, values)
            grids[target.weight] = grid
        inputs = {site: quant.grid(_held(site, quant, values)) for site, quant in self._inputs.items()}
        decision = self.quantizer.decision(grids, inputs)
        return decision, {name: array for name, array in real.items() if name in decision.weights}

    def _moved(self, fold: Fold, grid: QuantParams, values: Mapping[str, Array]) -> tuple[QuantParams, Array]:
        """The grid of the folded weight that has the unfolded weight's integers, and the unfolded weight on its grid.

        The weight is put on the grid first, so that folding it and rounding to the folded grid gives the integers.
        """
        weight = values[fold.weight]
        integers = to_integers(weight, grid).astype(np.float64)
        rows = len(weight)
        step = np.asarray(grid.step, np.float64)
        if grid.axis is None:
            step = np.repeat(step, rows)
        per_row = step.size // rows
        exact = (integers.reshape(step.size, -1) * step[:, None]).reshape(weight.shape)
        factor = np.abs(fold_factor(fold, values))
        moved = (step * np.repeat(factor, per_row)).astype(np.float32)
        moved = np.where(moved >= NORMAL, moved, np.float32(1))  # of a channel that the BatchNorm takes to 0
        changed = grid.model_copy(update={"step": tuple(moved.tolist()), "zero_point": (0,) * moved.size, "axis": 0})
        return changed, np.asarray(exact, weight.dtype)

    def _weight(self, target: Target, weights: Mapping[str, Array]) -> Trainable:
        stage = self.quantizer.stage
        fold = self.folds.get(target.weight) if self.section.batch_norm == "fold" else None
        axis = None if stage.weight_granularity == "tensor" else 0
        bits = self.quantizer.weight_bits(target.path)
        where = str(Site(target.path, "weight"))
        inner: Trainable = AbsMax(bits, axis, stage.group_size, where=where)
        if self.section.weight_ranges == "lsq":
            weight = fold_weights(weights, (fold,))[target.weight] if fold is not None else weights[target.weight]
            inner = _learned_weight(weight, bits, axis, where)
        return inner if fold is None else Folded(inner, fold)


def _held(site: Site, quant: Trainable, values: Mapping[str, Array]) -> dict[str, Array]:
    """What a fake quantization keeps in the model, under its own names."""
    found = {}
    for name in (*quant.parameters, *quant.buffers):
        found[name] = values[f"{site.path}.{site.held(name)}" if site.path else site.held(name)]
        if not np.isfinite(found[name]).all():
            raise ModelError(f"the training left the {name} of '{site}' at a value that is not finite")
    return found


def _learned_weight(weight: Array, bits: int, axis: int | None, where: str) -> Trainable:
    """LSQ from the paper's start, or from the step that clips nothing where that is smaller, as at 8 bits."""
    paper = LSQ.of_weight(weight, where, bits, axis)
    whole = AbsMax(bits, axis, where=where).grid({"weight": weight})
    step = np.minimum(
        np.asarray(paper.initial, np.float32), np.asarray(whole.step, np.float32).reshape(paper.initial.shape)
    )
    return LSQ(step, paper.low, paper.high, axis, activation=False, where=where)


def _moving_average(qat: Qat, grid: QuantParams, where: str) -> Trainable:
    symmetric = qat.quantizer.stage.activation_scheme == "symmetric"
    low, high = _range(grid)
    start = (max(low, -high), high) if symmetric else (low, high)  # a signed grid has one step more below 0
    return MovingAverage(grid.low, grid.high, symmetric, qat.section.rate, start, where=where)


def _lsq_plus(qat: Qat, grid: QuantParams, where: str) -> Trainable:
    return LSQPlus.of_range(*_range(grid), grid.low, grid.high, where)


def _pact(qat: Qat, grid: QuantParams, where: str) -> Trainable:
    bits = (grid.high - grid.low).bit_length()
    return PACT(_range(grid)[1], bits, grid.low < 0, where=where)


def _range(grid: QuantParams) -> tuple[float, float]:
    """Smallest and largest value of a grid with one step."""
    step, zero_point = grid.step[0], grid.zero_point[0]
    return (grid.low - zero_point) * step, (grid.high - zero_point) * step


_ACTIVATIONS: dict[str, Callable[[Qat, QuantParams, str], Trainable]] = {
    "moving_average": _moving_average,
    "lsq": lambda qat, grid, where: LSQ.of(grid, where),
    "lsq_plus": _lsq_plus,
    "pact": _pact,
}
