"""Wrappers of a backend that spoil one thing of its quantization, or of what it tells of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from slimbridge.decisions import Site
from slimbridge.graph import Graph
from slimbridge.ports import Array, FakeQuant, Model, Statistics, Tensor


class Honest:
    """Hands everything on."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class StepTooLarge(Honest):
    """The step of a fake quantization is 1/127 of itself too large, as when a threshold is divided by 126."""

    class _Ops(Honest):
        def fake_quant(self, x: Tensor, step: Tensor, *rest: Any) -> Tensor:
            return self.inner.fake_quant(x, step * (1 + 1 / 127), *rest)

    @property
    def ops(self) -> Any:
        return self._Ops(self.inner.ops)


class Reciprocal(StepTooLarge):
    """A product with the reciprocal of the step takes the place of the division."""

    class _Ops(Honest):
        def fake_quant(
            self, x: Tensor, step: Tensor, zero: Tensor | None, low: int, high: int, axis: Any = None, *away: bool
        ) -> Tensor:
            if axis is not None:
                return self.inner.fake_quant(x, step, zero, low, high, axis, *away)
            return self.inner.fake_quant(x * (1.0 / step), step / step, zero, low, high, axis, *away) * step


class AlwaysEven(StepTooLarge):
    """Halves go to even, whatever was asked for."""

    class _Ops(Honest):
        def fake_quant(self, x: Tensor, step: Tensor, *rest: Any) -> Tensor:
            return self.inner.fake_quant(x, step, *rest[:4])


class UnclippedGradient(StepTooLarge):
    """The straight-through estimator passes gradients of clipped entries too."""

    class _Ops(Honest):
        def fake_quant(self, x: Tensor, *rest: Any) -> Tensor:
            return x + self.inner.stop_gradient(self.inner.fake_quant(x, *rest) - x)


class OneRange(StepTooLarge):
    """The extremes of a channel are those of the tensor."""

    class _Ops(Honest):
        def extremes(self, x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
            low, high = self.inner.extremes(x, axis)
            return low * 0.0 + self.inner.extremes(x)[0], high


class ChangedInsertion(Honest):
    """Sites and fake quantizations as `site` and `quant` give them."""

    def site(self, site: Site) -> Site:
        return site

    def quant(self, quant: FakeQuant) -> FakeQuant:
        return quant

    def insert_quant(self, model: Model, quants: Mapping[Site, FakeQuant]) -> Model:
        return self.inner.insert_quant(model, {self.site(key): self.quant(item) for key, item in quants.items()})


class EveryCall(ChangedInsertion):
    """A site is in every call of its layer."""

    def site(self, site: Site) -> Site:
        return replace(site, call=None)


class FirstArgument(ChangedInsertion):
    """A site is the first of the tensors."""

    def site(self, site: Site) -> Site:
        return replace(site, argument=0)


class AlwaysTraining(ChangedInsertion):
    """A fake quantization is told that every pass is a training step's."""

    def quant(self, quant: FakeQuant) -> FakeQuant:
        return Trained(quant)


class Trained:
    """A fake quantization that takes every pass for one of training."""

    def __init__(self, inner: FakeQuant) -> None:
        self.inner = inner
        self.parameters, self.buffers, self.reads = inner.parameters, inner.buffers, inner.reads

    def __call__(self, ops: Any, x: Tensor, state: Mapping[str, Tensor], training: bool) -> Any:
        return self.inner(ops, x, state, True)


class FrozenReads(ChangedInsertion):
    """A fake quantization reads what the model held at insertion."""

    def insert_quant(self, model: Model, quants: Mapping[Site, FakeQuant]) -> Model:
        held = {name: self.inner.tensor(model, array) for name, array in self.inner.read(model).items()}
        return self.inner.insert_quant(model, {site: Frozen(quant, held) for site, quant in quants.items()})


class Frozen:
    """A fake quantization that is given other tensors for those it reads."""

    def __init__(self, inner: FakeQuant, held: Mapping[str, Tensor]) -> None:
        self.inner, self.held = inner, held
        self.parameters, self.buffers, self.reads = inner.parameters, inner.buffers, inner.reads

    def __call__(self, ops: Any, x: Tensor, state: Mapping[str, Tensor], training: bool) -> Any:
        old = {name: self.held[full] for name, full in self.inner.reads.items()}
        return self.inner(ops, x, {**state, **old}, training)


class NothingHeld(Honest):
    """Statistics are never held."""

    def hold_statistics(self, model: Model, hold: bool) -> Model:
        return model


class NoLowEnd(Honest):
    """A minimum is taken for a zero, as after a ReLU."""

    def change(self, found: Statistics) -> Statistics:
        return found._replace(min=max(found.min, 0.0))

    def reduce(
        self, model: Model, inputs: Sequence[Array], sites: Sequence[Site], histogram: bool = False
    ) -> dict[Site, Statistics]:
        found = self.inner.reduce(model, inputs, sites, histogram)
        return {site: self.change(statistics) for site, statistics in found.items()}


class ShiftedBins(NoLowEnd):
    """Bins are numbered from 1."""

    def change(self, found: Statistics) -> Statistics:
        held = found.histogram
        return found if held is None else found._replace(histogram=held._replace(counts=np.roll(held.counts, 1)))


class ChangedTrace(Honest):
    """A graph as `change` gives it."""

    def change(self, graph: Graph) -> Graph:
        raise NotImplementedError

    def trace(self, model: Model, inputs: Sequence[Array]) -> Graph:
        return self.change(self.inner.trace(model, inputs))


class LastCall(ChangedTrace):
    """Of a layer that runs several times one call is told."""

    def change(self, graph: Graph) -> Graph:
        return replace(graph, calls=tuple({call.path: call for call in graph.calls}.values()))


class NoEps(ChangedTrace):
    """Normalisations keep their eps to themselves."""

    def change(self, graph: Graph) -> Graph:
        nodes = [replace(n, attrs={}) if n.kind == "batch_norm" else n for n in graph.nodes]
        return replace(graph, nodes=tuple(nodes))


_FORMULA = "quantization: fake_quant equals its formula to the last bit"
_SITES = "quantization: a site is the tensor that its key says"

QUANTIZATION_FAULTS: tuple[tuple[Callable[[Any], Honest], str], ...] = (
    (StepTooLarge, _FORMULA),
    (Reciprocal, _FORMULA),
    (AlwaysEven, _FORMULA),
    (UnclippedGradient, "quantization: fake_quant has the gradients of STE and LSQ"),
    (OneRange, "quantization: extremes of a tensor and of its channels"),
    (EveryCall, _SITES),
    (FirstArgument, _SITES),
    (FrozenReads, "quantization: parameters of the model can be read, a clone reads its own"),
    (AlwaysTraining, "quantization: parameters are trained, buffers change in training steps only"),
    (NothingHeld, "statistics: held, BatchNorm normalises by them in training steps too"),
    (NoLowEnd, "statistics: reduce gives the extremes of a tensor"),
    (ShiftedBins, "statistics: a histogram's bins are exact"),
    (LastCall, "trace: the calls of modules, with what went in and out"),
    (NoEps, "trace: a normalisation says its eps"),
)
