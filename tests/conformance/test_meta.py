"""The tests of the conformance suite: a backend with one planted fault must fail, in the case that is about it.

Each fault is a wrapper that hands everything on to a real backend and spoils one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from slimbridge.conformance import (
    CASES,
    layers,
    masks,
    models,
    observation,
    operations,
    quantization,
    removals,
    run_conformance,
    surgery,
    tracing,
    training,
)
from slimbridge.conformance.suite import Bench
from slimbridge.decisions import PruneDecision
from slimbridge.graph import Graph
from slimbridge.ports import (
    Array,
    Backend,
    Device,
    Loss,
    Model,
    Optimizer,
    OptimizerSettings,
    Pass,
    Tensor,
)
from tests.conformance.quantization_faults import QUANTIZATION_FAULTS, Honest

MODULES = (layers, masks, models, observation, operations, quantization, removals, surgery, tracing, training)
STATISTICS = ("running_mean", "running_var")


class SwappedAxes(Honest):
    """Linear weights are read and written as (in, out) where that does not show in the shape."""

    @staticmethod
    def _swap(arrays: Mapping[str, Array]) -> dict[str, Array]:
        def square(array: Array) -> bool:
            return array.ndim == 2 and array.shape[0] == array.shape[1]

        return {name: np.ascontiguousarray(a.T) if square(a) else a for name, a in arrays.items()}

    def read(self, model: Model) -> dict[str, Array]:
        return self._swap(self.inner.read(model))

    def write(self, model: Model, arrays: Mapping[str, Array], partial: bool = False) -> Model:
        return self.inner.write(model, self._swap(arrays), partial)


class SharedClone(Honest):
    """A clone is the model itself."""

    def clone(self, model: Model) -> Model:
        return model


class StepSpoiled(Honest):
    """A training step after which `spoil` has changed what the model holds."""

    def spoil(self, before: dict[str, Array], after: dict[str, Array], inputs: Sequence[Array]) -> dict[str, Array]:
        raise NotImplementedError

    def train_step(
        self, model: Model, optimizer: Optimizer, inputs: Sequence[Array], loss: Loss, capture: Sequence[str] = ()
    ) -> dict[str, float]:
        before = self.inner.read(model)
        terms: dict[str, float] = self.inner.train_step(model, optimizer, inputs, loss, capture)
        self.inner.write(model, self.spoil(before, self.inner.read(model), inputs), partial=True)
        return terms


class StaleStatistics(StepSpoiled):
    """A training step leaves the running statistics as they were."""

    def spoil(self, before: dict[str, Array], after: dict[str, Array], inputs: Sequence[Array]) -> dict[str, Array]:
        return {name: array for name, array in before.items() if name.endswith(STATISTICS)}


class BiasedVariance(StepSpoiled):
    """The running variance is divided by n instead of n - 1 (of a normalisation right after the input)."""

    def spoil(self, before: dict[str, Array], after: dict[str, Array], inputs: Sequence[Array]) -> dict[str, Array]:
        n = inputs[0].size // inputs[0].shape[1]
        names = [name for name in after if name.endswith("running_var")]
        return {name: 0.9 * before[name] + (after[name] - 0.9 * before[name]) * (n - 1) / n for name in names}


class LeftInEval(Honest):
    """A training step runs in eval mode, as after a forward pass that did not restore the mode."""

    def train_step(
        self, model: Model, optimizer: Optimizer, inputs: Sequence[Array], loss: Loss, capture: Sequence[str] = ()
    ) -> dict[str, float]:
        model.eval()
        model.train = lambda mode=True: model
        try:
            terms: dict[str, float] = self.inner.train_step(model, optimizer, inputs, loss, capture)
        finally:
            del model.train
        return terms


class NoMomentum(Honest):
    """SGD forgets its velocity."""

    def make_optimizer(self, model: Model, settings: OptimizerSettings) -> Optimizer:
        return self.inner.make_optimizer(model, replace(settings, momentum=0.0, nesterov=False))


class DecoupledDecay(Honest):
    """Adam decays its weights as AdamW does."""

    def make_optimizer(self, model: Model, settings: OptimizerSettings) -> Optimizer:
        kind = "adamw" if settings.kind == "adam" else settings.kind
        return self.inner.make_optimizer(model, replace(settings, kind=kind))


class DeafToSeeds(Honest):
    """Every seed is 0."""

    def seed(self, seed: int) -> None:
        self.inner.seed(0)


class DoubledGradient(Honest):
    """Gradients are those of twice the loss."""

    def gradients(self, model: Model, inputs: Sequence[Array], loss: Loss, train: bool = False) -> dict[str, Array]:
        return {name: 2 * array for name, array in self.inner.gradients(model, inputs, loss, train).items()}


class FirstStatistics(Honest):
    """Surgery keeps the first entries of the running mean instead of the right ones."""

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        def first(name: str, axes: dict[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
            return {0: tuple(range(len(axes[0])))} if name.endswith("running_mean") else axes

        kept = {name: first(name, axes) for name, axes in decision.kept.items()}
        return self.inner.remove_channels(model, decision.model_copy(update={"kept": kept}), optimizer)


class DroppedSlot(Honest):
    """Surgery resets the optimizer's state."""

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        model = self.inner.remove_channels(model, decision, optimizer)
        if optimizer is not None:
            optimizer.load_state({name: np.zeros_like(array) for name, array in optimizer.state().items()})
        return model


class WrongCapture(Honest):
    """Each captured feature is another layer's."""

    def forward(self, model: Model, inputs: Sequence[Array | Tensor], capture: Sequence[str] = ()) -> Pass:
        found = self.inner.forward(model, inputs, capture)
        return Pass(found.output, dict(zip(found.features, reversed(list(found.features.values())), strict=True)))


class HalfAway(Honest):
    """Rounding takes ties away from zero."""

    class _Ops(Honest):
        def round(self, x: Tensor) -> Tensor:
            nearest = self.inner.round(x)
            away = self.inner.where(x > 0, x + 0.5, x - 0.5)
            return self.inner.where(self.inner.abs(x - nearest) == 0.5, away, nearest)

    @property
    def ops(self) -> Any:
        return self._Ops(self.inner.ops)


class LostCoupling(Honest):
    """The trace takes an addition for an operation on its first input alone."""

    def trace(self, model: Model, inputs: Sequence[Array]) -> Graph:
        graph = self.inner.trace(model, inputs)
        nodes = tuple(
            replace(node, kind="elementwise", inputs=node.inputs[:1]) if node.kind == "binary" else node
            for node in graph.nodes
        )
        return replace(graph, nodes=nodes)


class SwappedTransposed(Honest):
    """Transposed convolutions are read and written as (out, in) where that does not show in the shape."""

    @staticmethod
    def _swap(arrays: Mapping[str, Array]) -> dict[str, Array]:
        def square(array: Array) -> bool:
            return array.ndim == 4 and array.shape[0] == array.shape[1]

        return {name: a.swapaxes(0, 1).copy() if square(a) else a for name, a in arrays.items()}

    def read(self, model: Model) -> dict[str, Array]:
        return self._swap(self.inner.read(model))

    def write(self, model: Model, arrays: Mapping[str, Array], partial: bool = False) -> Model:
        return self.inner.write(model, self._swap(arrays), partial)


class WrongSlope(Honest):
    """LeakyReLU takes no notice of its slope."""

    class _Names(Honest):
        def LeakyReLU(self, slope: float) -> Any:  # noqa: N802
            return self.inner.LeakyReLU(0.01)

    @property
    def nn(self) -> Any:
        return self._Names(self.inner.nn)


class OneGroup(Honest):
    """GroupNorm normalises all channels together."""

    class _Names(Honest):
        def GroupNorm(self, groups: int, channels: int) -> Any:  # noqa: N802
            return self.inner.GroupNorm(1, channels)

    @property
    def nn(self) -> Any:
        return self._Names(self.inner.nn)


class OrdinaryConvolutions(Honest):
    """The trace takes transposed convolutions for ordinary ones."""

    def trace(self, model: Model, inputs: Sequence[Array]) -> Graph:
        graph = self.inner.trace(model, inputs)
        nodes = tuple(
            replace(node, attrs={**node.attrs, "transposed": False}) if node.kind == "conv" else node
            for node in graph.nodes
        )
        return replace(graph, nodes=nodes)


class FirstRows(Honest):
    """Surgery keeps the first entries of each layer's inputs on the way to the right shape."""

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        kept = {
            name: {axis: tuple(range(len(stays))) if axis == 1 else stays for axis, stays in axes.items()}
            for name, axes in decision.kept.items()
        }
        return self.inner.remove_channels(model, decision.model_copy(update={"kept": kept}), optimizer)


class ShiftedNorm(Honest):
    """Surgery keeps the first entries of each vector."""

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        kept = {
            name: {0: tuple(range(len(axes[0])))} if len(decision.sizes[name]) == 1 else axes
            for name, axes in decision.kept.items()
        }
        return self.inner.remove_channels(model, decision.model_copy(update={"kept": kept}), optimizer)


class StaleHeads(Honest):
    """Surgery does not tell layers how many attention heads they have left."""

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        return self.inner.remove_channels(model, decision.model_copy(update={"heads": {}}), optimizer)


class ForgottenZeros(Honest):
    """Zeros are held for one step only."""

    def train_step(
        self, model: Model, optimizer: Optimizer, inputs: Sequence[Array], loss: Loss, capture: Sequence[str] = ()
    ) -> dict[str, float]:
        terms: dict[str, float] = self.inner.train_step(model, optimizer, inputs, loss, capture)
        optimizer.hold_zeros({})
        return terms


class AddedZeros(Honest):
    """A call of `hold_zeros` adds to the calls before, so that nothing is ever lifted."""

    def make_optimizer(self, model: Model, settings: OptimizerSettings) -> Optimizer:
        optimizer = self.inner.make_optimizer(model, settings)
        hold, held = optimizer.hold_zeros, {}

        def add(masks: Mapping[str, Array]) -> None:
            hold({**held, **masks})
            held.update(masks)

        optimizer.hold_zeros = add
        return optimizer


class UnslicedZeros(Honest):
    """Surgery lifts what is held."""

    def remove_channels(self, model: Model, decision: PruneDecision, optimizer: Optimizer | None = None) -> Model:
        shape = decision.sizes["weight"]
        model = self.inner.remove_channels(model, decision, optimizer)
        kept = decision.kept["weight"][1]
        if optimizer is not None:
            optimizer.hold_zeros({"weight": np.ones((shape[0], len(kept)), bool)})
        return model


class ChangedPass(Honest):
    """Losses see the parameters as `change` gives them."""

    def change(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def gradients(self, model: Model, inputs: Sequence[Array], loss: Loss, train: bool = False) -> dict[str, Array]:
        def changed(result: Pass) -> Mapping[str, Tensor]:
            return loss(result._replace(parameters=self.change(result.parameters)))

        return self.inner.gradients(model, inputs, changed, train)


class DetachedParameters(ChangedPass):
    """No gradient flows to them."""

    def change(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: self.inner.ops.stop_gradient(tensor) for name, tensor in parameters.items()}


class NoParameters(Honest):
    """A pass without gradient leaves them out."""

    def forward(self, model: Model, inputs: Sequence[Array | Tensor], capture: Sequence[str] = ()) -> Pass:
        return self.inner.forward(model, inputs, capture)._replace(parameters={})


_HEADS = "surgery: attention loses whole heads, and knows their number"
_ZEROS = "masks: held zeros stay zero over steps, the others train as ever"
_PARAMETERS = "parameters: a loss reads them in canonical layout, and its gradient flows"
_TRANSPOSED = "layers: a transposed convolution equals its definition, weights (in, out / groups, height, width)"

FAULTS: tuple[tuple[Callable[[Any], Honest], str], ...] = (
    (SwappedAxes, "layout: linear weights are (out, in)"),
    (SharedClone, "weights: read, write, clone"),
    (StaleStatistics, "normalisation: a step updates the running statistics, the variance unbiased"),
    (BiasedVariance, "normalisation: a step updates the running statistics, the variance unbiased"),
    (LeftInEval, "normalisation: a step updates the running statistics, the variance unbiased"),
    (LeftInEval, "training: equal seeds give equal runs, dropout included"),
    (DeafToSeeds, "training: equal seeds give equal runs, dropout included"),
    (NoMomentum, "optimizers: three steps equal the formulas"),
    (DecoupledDecay, "optimizers: three steps equal the formulas"),
    (DoubledGradient, "gradients: equal the formula of softmax and cross entropy"),
    (FirstStatistics, "surgery: removing channels equals zeroing them"),
    (DroppedSlot, "surgery: training goes on with the same optimizer"),
    *QUANTIZATION_FAULTS,
    (SharedClone, "quantization: what is inserted has names, and goes without a trace"),
    (WrongCapture, "forward: eval mode, features by path"),
    (HalfAway, "ops: round goes half to even"),
    (LostCoupling, "trace: channel groups as derived by hand"),
    (OrdinaryConvolutions, "trace: a transposed convolution says so"),
    (SwappedTransposed, _TRANSPOSED),
    (WrongSlope, "layers: activations and functions equal NumPy's"),
    (OneGroup, "layers: LayerNorm and GroupNorm equal their formulas"),
    (FirstRows, "surgery: a transposed convolution loses inputs and outputs"),
    (ShiftedNorm, "surgery: a GroupNorm loses whole groups"),
    (StaleHeads, _HEADS),
    (FirstRows, _HEADS),
    (ForgottenZeros, _ZEROS),
    (AddedZeros, _ZEROS),
    (UnslicedZeros, "masks: held zeros follow their channels through surgery"),
    (DetachedParameters, _PARAMETERS),
    (NoParameters, _PARAMETERS),
)


def outcomes_of(backend: Any, device: Device, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Case -> message of the cases that fail, of the named ones."""
    monkeypatch.setattr("slimbridge.conformance.suite.CASES", {name: CASES[name] for name in names})
    return {outcome.case: outcome.message for outcome in run_conformance(backend, device) if not outcome.passed}


@pytest.mark.parametrize(("fault", "name"), [pytest.param(f, n, id=f"{f.__name__}-{n}") for f, n in FAULTS])
def test_a_planted_fault_is_caught(
    backend: Backend, device: Device, fault: Callable[[Any], Honest], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = outcomes_of(fault(backend), device, [name], monkeypatch)
    assert list(failed) == [name]
    # The fault itself must be seen, not a crash of the wrapper.
    assert "raised" not in failed[name], failed[name]


@pytest.mark.parametrize("name", sorted({name for _, name in FAULTS}))
def test_the_wrapper_alone_fails_nothing(backend: Backend, device: Device, name: str) -> None:
    CASES[name](Bench(Honest(backend), device))  # type: ignore[arg-type]


def test_a_fault_is_caught_where_it_is_and_nowhere_else(
    torch_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(outcomes_of(HalfAway(torch_backend), "cpu", list(CASES), monkeypatch)) == {
        "ops: round goes half to even"
    }


def test_every_kind_of_case_has_a_fault() -> None:
    """Layout, weights, ...: the word before the colon."""
    without = {name.partition(":")[0] for name in CASES} - {name.partition(":")[0] for _, name in FAULTS}
    assert without == {"names", "capabilities"}
