"""Penalties before channels are removed, on both frameworks, against NumPy; soft filter pruning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slimbridge.errors import ModelError
from slimbridge.graph import Graph, Units, find_units
from slimbridge.parity import relative, tolerance
from slimbridge.plan.pruning import PreparationSection, PruneStage
from slimbridge.ports import Array, Backend, Model, Pass
from slimbridge.prune import Pruner, zeroed
from slimbridge.prune.penalties import penalty
from slimbridge.prune.soft import SoftPruning, zeroed_filters

RNG = np.random.default_rng(8)
X = RNG.standard_normal((2, 3, 4, 4))


def model_of(backend: Backend) -> Model:
    """A residual net whose flattened channels feed a linear layer: axes that are shared, tied and stretched."""
    nn = backend.nn

    class Net(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
            self.c, self.m, self.fc = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(24, 5)

        def forward(self, x: Any) -> Any:
            x = nn.relu(self.n(self.a(x)))
            x = nn.relu(x + self.b(x))
            return self.fc(nn.flatten(nn.relu(self.m(self.c(x))), 1))

    model = backend.place(Net(), dtype="float64")
    rng = np.random.default_rng(2)
    arrays = {name: rng.standard_normal(array.shape) for name, array in sorted(backend.read(model).items())}
    return backend.write(model, {name: np.abs(a) + 0.5 if "var" in name else a for name, a in arrays.items()})


def section(method: Any, strength: float = 0.01, epochs: int = 10) -> PreparationSection:
    return PreparationSection.model_validate(
        {"method": method, "strength": strength, "train": {"epochs": epochs, "learning_rate": 0.05}}
    )


def scene(backend: Backend) -> tuple[Model, Graph, Units]:
    model = model_of(backend)
    graph = backend.trace(model, [X.astype(np.float32)])
    return model, graph, find_units(graph)


def evaluated(backend: Backend, model: Model, made: Any, done: float = 0.0) -> tuple[float, dict[str, Array]]:
    """Value and gradient of a penalty."""
    seen = []

    def loss(result: Pass) -> dict[str, Any]:
        term = made(result, done)
        seen.append(float(backend.ops.numpy(term)))
        return {"penalty": term}

    gradients = backend.gradients(model, [X], loss)
    return seen[0], gradients


def groups_by_hand(weights: dict[str, Array]) -> list[list[tuple[str, tuple[Any, ...]]]]:
    """(parameter, index) of all that makes up each removable unit: 4 of the residual sum, 6 of the last convolution."""
    found = []
    every = slice(None)
    for i in range(4):
        names = ("a.weight", "a.bias", "n.weight", "n.bias", "b.weight", "b.bias")
        found.append([*((name, (i,)) for name in names), ("b.weight", (every, i)), ("c.weight", (every, i))])
    for i in range(6):
        rows = [(name, (i,)) for name in ("c.weight", "c.bias", "m.weight", "m.bias")]
        found.append([*rows, ("fc.weight", (every, slice(4 * i, 4 * i + 4)))])
    return found


def test_group_lasso(backend: Backend) -> None:
    model, graph, units = scene(backend)
    weights = {name: array.copy() for name, array in backend.read(model).items()}
    value, gradients = evaluated(
        backend, model, penalty(section("group_lasso"), backend.ops, units, graph, backend, model)
    )
    expected, slope = 0.0, {name: np.zeros(array.shape) for name, array in weights.items()}
    for unit in groups_by_hand(weights):
        norm = sum(float(np.square(weights[name][index]).sum()) for name, index in unit) ** 0.5
        expected += norm
        for name, index in unit:
            slope[name][index] += 0.01 * weights[name][index] / norm
    assert relative(np.array(value), np.array(0.01 * expected)) <= tolerance("operation_float64").value
    for name, gradient in gradients.items():
        assert relative(gradient, slope[name]) <= tolerance("operation_float64").value or not slope[name].any(), name
    assert not gradients["fc.bias"].any()


def test_group_lasso_of_a_unit_that_is_zero_has_a_gradient(backend: Backend) -> None:
    model, graph, units = scene(backend)
    weights = {name: array.copy() for name, array in backend.read(model).items()}
    for unit in groups_by_hand(weights)[:5]:
        for name, index in unit:
            weights[name][index] = 0
    backend.write(model, weights)
    made = penalty(section("group_lasso"), backend.ops, units, graph, backend, model)
    value, gradients = evaluated(backend, model, made)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    assert not gradients["a.weight"].any()
    assert gradients["m.weight"][1:].all()


def test_bn_slimming(backend: Backend) -> None:
    model, graph, units = scene(backend)
    made = penalty(section("bn_slimming", 0.5), backend.ops, units, graph, backend, model)
    value, gradients = evaluated(backend, model, made)
    scales = {name: backend.read(model)[name] for name in ("n.weight", "m.weight")}
    expected = 0.5 * sum(float(np.abs(scale).sum()) for scale in scales.values())
    assert relative(np.array(value), np.array(expected)) <= tolerance("operation_float64").value
    for name, gradient in gradients.items():
        assert np.array_equal(gradient, 0.5 * np.sign(scales[name]) if name in scales else np.zeros(gradient.shape))


@pytest.mark.parametrize(("done", "coefficient"), [(0.0, 0.2), (0.05, 0.2), (0.1, 0.4), (0.3, 0.8), (1.0, 2.0)])
def test_growing(backend: Backend, done: float, coefficient: float) -> None:
    """Channel 1 of the sum and channel 2 of the last convolution go; an entry of both counts once."""
    model, graph, units = scene(backend)
    goes = [int(units.touched["a.weight", 0][1]), int(units.touched["c.weight", 0][2])]
    weights = backend.read(model)
    made = penalty(section("growing", 0.2), backend.ops, units, graph, backend, model, goes)
    value, gradients = evaluated(backend, model, made, done)
    marked = {name: np.zeros(array.shape) for name, array in weights.items()}
    for unit in (groups_by_hand(weights)[1], groups_by_hand(weights)[6]):
        for name, index in unit:
            marked[name][index] = 1
    expected = coefficient / 2 * sum(float((weights[name] ** 2 * mark).sum()) for name, mark in marked.items())
    assert relative(np.array(value), np.array(expected)) <= tolerance("operation_float64").value
    for name, gradient in gradients.items():
        wanted = coefficient * weights[name] * marked[name]
        assert not wanted.any() or relative(gradient, wanted) <= tolerance("operation_float64").value
        assert np.array_equal(gradient != 0, wanted != 0)


def test_penalties_that_have_nothing_to_act_on(torch_backend: Backend) -> None:
    nn = torch_backend.nn
    lone = nn.Sequential(nn.Conv2d(3, 4, 1))
    graph = torch_backend.trace(lone, [X.astype(np.float32)])
    for method, message in (
        ("group_lasso", r"group_lasso: no channel of any layer may be removed"),
        ("bn_slimming", r"bn_slimming: no BatchNorm scale belongs to a channel"),
        ("growing", r"growing: no unit that will go was given"),
    ):
        with pytest.raises(ModelError, match=message):
            penalty(section(method), torch_backend.ops, find_units(graph), graph, torch_backend, lone)


# Soft filter pruning


def decided(backend: Backend, model: Model) -> Any:
    graph = backend.trace(model, [X.astype(np.float32)])
    stage = PruneStage(pruning_ratio=0.5)
    return lambda weights: Pruner(stage).decide(graph, weights)


def test_soft_pruning_zeroes_filters_at_each_epochs_first_step(backend: Backend) -> None:
    model = model_of(backend)
    soft = SoftPruning(backend, decided(backend, model))
    before = backend.read(model)
    decision = soft.decide(before)
    for step in (1, 2, 4):
        soft(model, None, step, 3)  # type: ignore[arg-type]
        assert all(np.array_equal(array, before[name]) for name, array in backend.read(model).items())
    soft(model, None, 3, 3)  # type: ignore[arg-type]
    after = backend.read(model)
    for name, array in after.items():
        wanted = before[name].copy()
        if name.split(".")[0] in "abc":
            gone = np.setdiff1d(np.arange(len(wanted)), decision.kept[name][0])
            assert gone.size == len(wanted) // 2
            wanted[gone] = 0
        assert np.array_equal(array, wanted), name


def test_a_soft_filter_grows_again_and_one_with_all_it_touches_does_not(backend: Backend) -> None:
    weights = backend.read(model_of(backend))
    decision = decided(backend, model_of(backend))(weights)
    gone = np.setdiff1d(np.arange(6), decision.kept["c.weight"][0])

    def loss(result: Pass) -> dict[str, Any]:
        return {"sum": backend.ops.sum(result.output**2)}

    softly = model_of(backend)
    backend.write(softly, zeroed_filters(weights, decision, backend.layers(softly)), partial=True)
    assert backend.gradients(softly, [X], loss, train=True)["c.weight"][gone].any()
    hard = backend.write(model_of(backend), zeroed(weights, decision))
    for name in ("c.weight", "m.weight"):
        assert not backend.gradients(hard, [X], loss, train=True)[name][gone].any()
