"""Cases on removing channels: it equals zeroing every removed entry, and training goes on."""

from __future__ import annotations

import numpy as np

from slimbridge.conformance.models import image, output, topology
from slimbridge.conformance.suite import Bench, case, refuses, require, within
from slimbridge.conformance.topologies import TOPOLOGIES
from slimbridge.conformance.training import cross_entropy
from slimbridge.decisions import PruneDecision
from slimbridge.graph import cost_of, find_units
from slimbridge.parity.measure import differing, relative
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Model, OptimizerSettings
from slimbridge.prune import Pruner, zeroed

RATIOS = (0.3, 0.5, 0.75)


def decide(bench: Bench, model: Model, ratio: float) -> PruneDecision:
    """An L1 decision."""
    graph = bench.backend.trace(model, [image(1)])
    return Pruner(PruneStage(pruning_ratio=ratio)).decide(graph, bench.backend.read(model))


@case("surgery: removing channels equals zeroing them")
def removal(bench: Bench) -> None:
    """Every topology at several ratios; the pruned shapes are those decided; the statistics are the kept ones."""
    backend = bench.backend
    for item in TOPOLOGIES:
        for ratio in RATIOS:
            model = topology(bench, item.name)
            decision = decide(bench, model, ratio)
            before = backend.read(model)
            silent = backend.write(backend.clone(model), zeroed(before, decision))
            pruned = backend.remove_channels(backend.clone(model), decision)
            figure = relative(output(bench, pruned, image()), output(bench, silent, image()))
            within(f"{item.name}, ratio {ratio}", figure, "removal")
            expected = {name: sliced(array, decision.kept.get(name, {})) for name, array in before.items()}
            wrong = differing(backend.read(pruned), expected)
            require(wrong == 0, f"{item.name}, ratio {ratio}: {wrong} entries are not those that stay")
            require(differing(backend.read(model), before) == 0, f"{item.name}: pruning a clone changed the original")


@case("surgery: the pruned model traces, saves and loads again")
def again(bench: Bench) -> None:
    """Its graph has the smaller cost; a fresh model takes the form and the weights."""
    backend = bench.backend
    for item in TOPOLOGIES:
        model = topology(bench, item.name)
        decision = decide(bench, model, 0.5)
        cost = cost_of(backend.trace(model, [image(1)]))
        pruned = backend.remove_channels(backend.clone(model), decision)
        graph = backend.trace(pruned, [image(1)])
        smaller = cost_of(graph)
        require(smaller.macs < cost.macs, f"{item.name}: {smaller.macs} MACs after, {cost.macs} before")
        require(find_units(graph).groups(), f"{item.name}: the pruned model has no channel groups")
        fresh = backend.write(backend.remove_channels(topology(bench, item.name), decision), backend.read(pruned))
        require(
            np.array_equal(output(bench, fresh, image()), output(bench, pruned, image())),
            f"{item.name}: form and weights from elsewhere give another output",
        )


@case("surgery: training goes on with the same optimizer")
def training_goes_on(bench: Bench) -> None:
    """Pruning between two steps equals starting from sliced weights and sliced optimizer state."""
    backend = bench.backend
    labels = np.array([0, 3])
    for settings in (OptimizerSettings(), OptimizerSettings(kind="adam")):
        for name in ("residual", "flatten head", "depthwise", "grouped"):
            model = topology(bench, name)
            decision = decide(bench, model, 0.5)
            optimizer = backend.make_optimizer(model, settings)
            optimizer.set_lr(0.01)
            loss = cross_entropy(bench, model, labels)
            backend.train_step(model, optimizer, [image()], loss)
            weights, state = backend.read(model), optimizer.state()
            model = backend.remove_channels(model, decision, optimizer)
            backend.train_step(model, optimizer, [image()], loss)
            twin = backend.remove_channels(topology(bench, name), decision)
            kept = {key: sliced(array, decision.kept.get(key, {})) for key, array in weights.items()}
            twin = backend.write(twin, kept)
            other = backend.make_optimizer(twin, settings)
            other.set_lr(0.01)
            other.load_state({key: _slot(key, array, decision) for key, array in state.items()})
            backend.train_step(twin, other, [image()], cross_entropy(bench, twin, labels))
            first, second = backend.read(model), backend.read(twin)
            wrong = {key for key in first if relative(first[key], second[key]) > 0}
            require(not wrong, f"{name}, {settings.kind}: {len(wrong)} arrays differ, e.g. {sorted(wrong)[:2]}")


@case("surgery: a decision for another model is refused")
def refusal(bench: Bench) -> None:
    """And nothing is changed."""
    backend = bench.backend
    model, other = topology(bench, "residual"), topology(bench, "chain")
    decision, before = decide(bench, other, 0.5), backend.read(model)
    refuses("a decision of another model", lambda: backend.remove_channels(model, decision))
    twice = decide(bench, model, 0.5)
    pruned = backend.remove_channels(backend.clone(model), twice)
    refuses("a decision applied twice", lambda: backend.remove_channels(pruned, twice))
    require(differing(backend.read(model), before) == 0, "a refused decision changed the model")


def sliced(array: Array, axes: dict[int, tuple[int, ...]]) -> Array:
    """The entries that stay."""
    for axis, kept in axes.items():
        array = np.take(array, kept, axis=axis)
    return array


def _slot(key: str, array: Array, decision: PruneDecision) -> Array:
    name, _, _ = key.rpartition("/")
    return sliced(array, decision.kept.get(name, {})) if array.ndim else array
