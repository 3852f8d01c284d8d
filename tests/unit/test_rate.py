"""Rating channel groups: what counts, how it is reduced and normalised, presets, evidence."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimbridge.errors import ModelError, SlimbridgeError
from slimbridge.graph import find_units
from slimbridge.parity import relative, tolerance
from slimbridge.plan import PruneStage
from slimbridge.plan.registries import IMPORTANCES
from slimbridge.ports import Array, Backend, Loss, tensors_in
from slimbridge.prune.coupled import coupled_axes, structures
from slimbridge.prune.evidence import Evidence, collect, probes
from slimbridge.prune.presets import Definition
from slimbridge.prune.rate import normalise, rate_groups

EXACT = tolerance("statistics_float64").value
RNG = np.random.default_rng(4)
X = RNG.standard_normal((2, 3, 6, 6)).astype(np.float32)


class Sum(nn.Module):
    """a(x) + b(x), both normalised; then a depthwise and a pointwise convolution, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deep, self.point = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5 * 9, 2)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.bn_a(self.a(x)) + self.bn_b(self.b(x)))
        x = torch.relu(self.point(self.deep(x)))
        return self.fc(torch.flatten(nn.functional.max_pool2d(x, 2), 1))


class Case:
    """A model, its graph and units, weights and random evidence."""

    def __init__(self, backend: Backend, model: nn.Module) -> None:
        arrays = {
            key: RNG.standard_normal(array.shape).astype(np.float32) for key, array in backend.read(model).items()
        }
        self.model = backend.write(model, {key: np.abs(a) if "var" in key else a for key, a in arrays.items()})
        self.graph = backend.trace(model, [X])
        self.weights = backend.read(model)
        self.units = find_units(self.graph)
        self.groups = self.units.groups()
        self.gradients = {key: RNG.standard_normal(array.shape) for key, array in self.weights.items()}

    def rate(
        self, evidence: Evidence | None = None, seed: int = 0, first: bool = False, **stage: Any
    ) -> tuple[Array, ...]:
        """Of all groups, or of the first alone."""
        definition = Definition.of(PruneStage(pruning_ratio=0.5, **stage), seed)
        groups = self.groups[:1] if first else self.groups
        found = evidence or Evidence(self.gradients, {key: a * a for key, a in self.gradients.items()})
        return rate_groups(self.graph, self.units, groups, self.weights, definition, found)


@pytest.fixture
def case(torch_backend: Backend) -> Case:
    return Case(torch_backend, Sum())


def definition(**stage: Any) -> Definition:
    return Definition.of(PruneStage(pruning_ratio=0.5, **stage))


# What is coupled


def test_what_is_coupled_and_in_which_order(case: Case) -> None:
    first = set(case.groups[0].units.tolist())
    found = [
        (axis.parameter, axis.axis, axis.role, axis.kind, axis.side)
        for axis in coupled_axes(case.graph, case.units)
        if first.intersection(axis.units.tolist())
    ]
    assert found == [
        ("a.weight", 0, "weight", "conv", "out"),
        ("bn_a.weight", 0, "weight", "batch_norm", "norm"),
        ("bn_a.bias", 0, "bias", "batch_norm", "norm"),
        ("b.weight", 0, "weight", "conv", "out"),
        ("b.bias", 0, "bias", "conv", "out"),
        ("bn_b.weight", 0, "weight", "batch_norm", "norm"),
        ("bn_b.bias", 0, "bias", "batch_norm", "norm"),
        ("deep.weight", 0, "weight", "conv", "norm"),
        ("deep.bias", 0, "bias", "conv", "norm"),
        ("point.weight", 1, "weight", "conv", "in"),
    ]


def test_sides_of_a_transposed_convolution(torch_backend: Backend) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2), nn.Conv2d(6, 2, 1))
    case = Case(torch_backend, model)
    sides = {(axis.parameter, axis.axis): axis.side for axis in coupled_axes(case.graph, case.units)}
    assert (sides["1.weight", 0], sides["1.weight", 1]) == ("in", "out")
    (_, found) = case.rate()
    expected = np.abs(case.weights["1.weight"].astype(np.float64)).mean((0, 2, 3))
    assert relative(found, expected) <= EXACT


def of_parts(case: Case, names: tuple[str, ...]) -> list[Array]:
    """By channel of the first group: the float64 rows of the named parameters, "point.weight" by its inputs."""
    arrays = {name: case.weights[name].astype(np.float64) for name in names}
    return [np.moveaxis(a, 1, 0).reshape(4, -1) if "point" in n else a.reshape(4, -1) for n, a in arrays.items()]


PRODUCERS = ("a.weight", "b.weight")
NORMS = ("bn_a.weight", "bn_b.weight")
COUPLED = (*PRODUCERS, *NORMS, "bn_a.bias", "bn_b.bias", "b.bias", "deep.weight", "deep.bias", "point.weight")


@pytest.mark.parametrize(
    ("rated", "names"), [("producers", PRODUCERS), ("norms", NORMS), ("coupled", COUPLED), (None, PRODUCERS)]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "max", None])
def test_what_counts_and_how_it_is_reduced(
    case: Case, rated: str | None, names: tuple[str, ...], reduction: str | None
) -> None:
    (found,) = case.rate(importance="l1_norm", rated=rated, group_reduction=reduction, first=True)
    parts = np.array([np.abs(part).mean(1) for part in of_parts(case, names)])
    expected = {"sum": parts.sum(0), "max": parts.max(0)}.get(reduction or "mean", parts.mean(0))
    assert relative(found, expected) <= EXACT


def test_the_master_is_the_first(case: Case) -> None:
    found, *_ = case.rate(importance="l2_norm", group_reduction="master")
    assert relative(found, np.linalg.norm(of_parts(case, ("a.weight",))[0], axis=1)) <= EXACT
    (found,) = case.rate(importance="bn_scale", group_reduction="master", first=True)
    assert relative(found, np.abs(case.weights["bn_a.weight"])) <= EXACT


def test_the_group_norm_is_that_of_everything_coupled(case: Case) -> None:
    found, *_ = case.rate(importance="group_norm")
    assert relative(found, np.linalg.norm(np.hstack(of_parts(case, COUPLED)), axis=1)) <= EXACT


def test_inputs_behind_a_flattening_belong_to_their_channel(case: Case) -> None:
    """Nine inputs of the linear layer read one channel: they are nine contributions, and their sum is the channel's."""
    _, found = case.rate(importance="group_norm")
    point = [case.weights["point.weight"].reshape(5, -1), case.weights["point.bias"].reshape(5, 1)]
    reader = case.weights["fc.weight"].reshape(2, 5, 9).transpose(1, 0, 2).reshape(5, -1)
    assert relative(found, np.linalg.norm(np.hstack([*point, reader]).astype(np.float64), axis=1)) <= EXACT


def test_a_layer_that_makes_a_part_of_the_group(torch_backend: Backend) -> None:
    """Two layers joined and added to a third: the mean is over two layers; the first that makes a channel leads."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1)
            self.fc = nn.Linear(5, 2)

        def forward(self, x: Any) -> Any:
            return self.fc((torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).mean((2, 3)))

    case = Case(torch_backend, Joined())
    (group,) = case.groups
    size = {name: np.abs(case.weights[f"{name}.weight"].astype(np.float64)).mean((1, 2, 3)) for name in "abc"}
    joined = np.concatenate([size["a"], size["b"]])
    order = [case.units.touched["c.weight", 0].tolist().index(unit) for unit in group.units.tolist()]
    (found,) = case.rate()
    assert relative(found, ((joined + size["c"]) / 2)[order]) <= EXACT
    (found,) = case.rate(group_reduction="master")
    assert relative(found, joined[order]) <= EXACT


def test_filters_are_compared_within_what_the_group_reads(torch_backend: Backend) -> None:
    """A layer that reads two groups: the columns of one group are compared with each other alone."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1)

        def forward(self, x: Any) -> Any:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    case = Case(torch_backend, Two())
    found = case.rate(importance="fpgm", rated="coupled", group_reduction="sum")
    reads = case.weights["c.weight"].reshape(2, 7).T.astype(np.float64)
    for name, part, values in zip("ab", (reads[:3], reads[3:]), found, strict=True):
        makes = (case.weights[f"{name}.weight"].reshape(len(part), -1), case.weights[f"{name}.bias"][:, None], part)
        apart = sum(np.linalg.norm(rows[:, None] - rows[None], axis=2).sum(1) for rows in makes)
        assert relative(values, np.asarray(apart)) <= tolerance("operation").value


# Evidence


def test_importances_of_gradients(case: Case) -> None:
    rated = [(case.weights[name], case.gradients[name]) for name in PRODUCERS]
    products = [np.abs(w.astype(np.float64) * g).reshape(4, -1).sum(1) for w, g in rated]
    taylor, other = case.rate(importance="taylor")
    assert relative(taylor, sum(products)) <= EXACT
    curved = [(w.astype(np.float64) ** 2 * g**2 / 2).reshape(4, -1).sum(1) for w, g in rated]
    assert relative(case.rate(importance="fisher")[0], sum(curved)) <= EXACT
    snip = case.rate(importance="snip", selection="global")
    assert relative(snip[0], taylor / (taylor.sum() + other.sum())) <= EXACT
    assert relative(np.array([sum(values.sum() for values in snip)]), np.ones(1)) <= EXACT


def test_parameters_without_a_gradient_are_not_rated(case: Case) -> None:
    gradients = {key: array for key, array in case.gradients.items() if key != "b.weight"}
    found, _ = case.rate(Evidence(gradients), importance="taylor")
    product = np.abs(case.weights["a.weight"].astype(np.float64) * gradients["a.weight"])
    assert relative(found, product.reshape(4, -1).sum(1)) <= EXACT
    with pytest.raises(
        ModelError, match=r"layer 'a': importance 'taylor' finds nothing to rate for 4 of .* 4 channels"
    ):
        case.rate(Evidence({}), importance="taylor")


def cubes(backend: Backend) -> Any:
    def objective(inputs: tuple[Array, ...], labels: Array) -> Loss:
        native = {"y": labels}
        return lambda result: {"loss": backend.ops.mean(tensors_in(result.output)[0] ** 3) * float(native["y"][0])}

    return objective


def test_gradients_are_means_over_the_batches(backend: Backend) -> None:
    layers = backend.nn
    model = layers.Sequential(layers.Conv2d(3, 4, 1), layers.BatchNorm2d(4), layers.Conv2d(4, 2, 1))
    graph = backend.trace(model, [X])
    batches = [((X,), np.array([1.0])), ((X[:1],), np.array([-2.0])), ((2 * X,), np.array([3.0]))]
    before = backend.read(model)
    each = [backend.gradients(model, inputs, cubes(backend)(inputs, labels)) for inputs, labels in batches]
    found = collect(backend, model, graph, "gradients", batches, cubes(backend))
    squared = collect(backend, model, graph, "squared_gradients", batches, cubes(backend))
    assert not found.squared_gradients and not squared.gradients and not found.activations
    for name in ("0.weight", "2.bias"):
        stack = np.array([gradients[name] for gradients in each], np.float64)
        assert relative(found.gradients[name], stack.mean(0)) <= EXACT
        assert relative(squared.squared_gradients[name], (stack**2).mean(0)) <= EXACT
    assert all(np.array_equal(array, before[name]) for name, array in backend.read(model).items())


@pytest.mark.parametrize("needs", ["gradients", "squared_gradients", "activations"])
def test_no_batch_is_an_error(torch_backend: Backend, needs: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with pytest.raises(ModelError, match=rf"needs {needs.replace('_', ' ')} needs calibration data: found no batch"):
        collect(torch_backend, model, torch_backend.trace(model, [X]), needs, [], cubes(torch_backend))
    nothing = collect(torch_backend, model, torch_backend.trace(model, [X]), "weights", [], cubes(torch_backend))
    assert nothing == Evidence()


def test_activations_behind_the_normalisation_and_the_function(backend: Backend) -> None:
    layers = backend.nn
    model = layers.Sequential(
        layers.Conv2d(3, 4, 3), layers.BatchNorm2d(4), layers.ReLU(), layers.Conv2d(4, 5, 1), layers.ReLU6(),
        layers.Conv2d(5, 3, 1), layers.Sigmoid(), layers.Flatten(), layers.Linear(48, 6), layers.GELU(),
        layers.Linear(6, 2),
    )  # fmt: skip
    batches = [((X,), np.zeros(2)), ((3 * X[:1],), np.zeros(1))]
    found = collect(backend, model, backend.trace(model, [X]), "activations", batches, cubes(backend)).activations
    assert set(found) == {"0", "3", "5", "8", "10"}
    for layer, behind in {"0": "2", "3": "4", "5": "6", "8": "9", "10": "10"}.items():
        seen = [backend.ops.numpy(backend.forward(model, inputs, [behind]).features[behind]) for inputs, _ in batches]
        values = np.concatenate([np.moveaxis(a, 1, 0).reshape(a.shape[1], -1) for a in seen], axis=1)
        assert relative(found[layer]["mean"], np.abs(values).mean(1, dtype=np.float64)) <= tolerance("operation").value
        assert np.array_equal(found[layer]["apoz"], (values == 0).mean(1))
    assert found["0"]["apoz"].max() > 0


def test_what_a_probe_does_not_follow(torch_backend: Backend) -> None:
    """A sum behind the normalisation, an output read twice: what the layer itself gives is taken."""

    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b, self.fc = (
                nn.Conv2d(3, 3, 1),
                nn.BatchNorm2d(3),
                nn.Conv2d(3, 3, 1),
                nn.Linear(3, 2),
            )

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.bn(self.a(x)) + x)
            x = self.b(x)
            return self.fc((torch.relu(x) * x).mean((2, 3)))

    model = Shortcut()
    found = {probe.layer: probe for probe in probes(torch_backend.trace(model, [X]))}
    assert {layer: probe.captured for layer, probe in found.items()} == {"a": "bn", "b": "b", "fc": "fc"}
    assert all(probe.function(np.array([-1.0])) == -1 for probe in found.values())


def test_importances_of_activations(torch_backend: Backend) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))
    case = Case(torch_backend, model)
    evidence = collect(torch_backend, model, case.graph, "activations", [((X,), X)], cubes(torch_backend))
    mean = case.rate(evidence, importance="activation_mean")
    zeros = case.rate(evidence, importance="activation_apoz")
    for layer, means, shares in zip("02", mean, zeros, strict=True):
        assert np.array_equal(means, evidence.activations[layer]["mean"])
        assert np.array_equal(shares, 1 - evidence.activations[layer]["apoz"])
    with pytest.raises(
        SlimbridgeError, match=r"rated: found coupled; importance 'activation_mean' .* 'producers' only"
    ):
        case.rate(evidence, importance="activation_mean", rated="coupled")


# Refusals


@pytest.mark.parametrize("importance", [name for name in IMPORTANCES.names() if "activation" not in name])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(case: Case, importance: str, bad: float) -> None:
    name = "bn_a.weight" if importance == "bn_scale" else "a.weight"
    flat = case.weights[name].reshape(-1)
    flat[[0, 3]] = bad
    expected = rf"layer '{name[:-7]}': 2 of {flat.size} entries of its weight are not finite"
    with pytest.raises(ModelError, match=expected):
        case.rate(importance=importance)


@pytest.mark.parametrize(("importance", "what"), [("taylor", "gradient"), ("snip", "gradient"), ("fisher", "squared")])
def test_gradients_that_are_not_finite_are_refused(case: Case, importance: str, what: str) -> None:
    case.gradients["b.weight"].reshape(-1)[:3] = np.inf
    square = {key: array**2 for key, array in case.gradients.items()}
    evidence = Evidence({} if what == "squared" else case.gradients, square)
    with pytest.raises(ModelError, match=rf"layer 'b': 3 of 108 entries of its weight's {what}.* are not finite"):
        case.rate(evidence, importance=importance)


def test_a_group_without_a_normalisation_has_no_scale(torch_backend: Backend) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 2, 1))
    with pytest.raises(
        ModelError, match=r"layer '2': importance 'bn_scale' finds nothing to rate for 5 of its group's 5"
    ):
        Case(torch_backend, model).rate(importance="bn_scale")


# Normalisation

POSITIVE = st.lists(st.floats(0.001, 1000), min_size=1, max_size=20).map(np.array)


@given(POSITIVE)
def test_normalisations(values: Array) -> None:
    assert np.array_equal(normalise(values, "none"), values)
    assert relative(normalise(values, "mean").mean(keepdims=True), np.ones(1)) <= EXACT
    assert normalise(values, "max").max() == 1
    assert relative(normalise(values, "sum").sum(keepdims=True), np.ones(1)) <= EXACT
    standard = normalise(values, "standard")
    assert standard.min() == 0 and standard.max() <= 1
    if len(set(values.tolist())) > 1:
        exact = [(value - fmean(values)) / (stdev(values) + 1e-8) for value in values.tolist()]
        assert relative(normalise(values, "gaussian"), np.array(exact)) <= tolerance("operation").value


@given(POSITIVE)
def test_lamp_in_loops(values: Array) -> None:
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    expected = [values[i] / sum(values[j] for j in order[order.index(i) :]) for i in range(len(values))]
    assert relative(normalise(values, "lamp"), np.array(expected)) <= EXACT


@pytest.mark.parametrize("how", ["none", "mean", "max", "sum", "standard", "gaussian", "lamp"])
@given(values=POSITIVE)
def test_a_normalisation_keeps_the_order(how: str, values: Array) -> None:
    found = normalise(values, how)
    order = np.argsort(values, kind="stable")
    assert (np.diff(found[order]) >= 0).all()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("how", ["none", "mean", "max", "sum", "standard", "gaussian", "lamp"])
@pytest.mark.parametrize("size", [1, 4])
def test_a_group_of_zeros_stays_one(how: str, size: int) -> None:
    assert np.array_equal(normalise(np.zeros(size), how), np.zeros(size))


# Definitions


def test_the_definition_of_a_plain_stage() -> None:
    found = definition()
    assert (found.name, found.rated, found.group_reduction) == ("l1_norm", "producers", "mean")
    assert (found.normalisation, found.count_rule, found.selection) == ("none", "round", "local")
    assert (found.round_to, found.min_channels, found.max_ratio, found.seed) == (1, 1, None, 0)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ({"selection": "global"}, {"normalisation": "mean"}),
        ({"selection": "isomorphic"}, {"normalisation": "mean"}),
        ({"selection": "global", "normalisation": "none"}, {"normalisation": "none"}),
        ({"selection": "global", "importance": "lamp"}, {"normalisation": "lamp"}),
        ({"selection": "global", "importance": "snip"}, {"normalisation": "total"}),
        ({"importance": "lamp", "normalisation": "max"}, {"normalisation": "max"}),
        ({"importance": "group_norm"}, {"rated": "coupled", "group_reduction": "sum"}),
        ({"importance": "bn_scale"}, {"rated": "norms"}),
        ({"preset": "paddleslim"}, {"group_reduction": "master", "rated": "producers", "count_rule": "round"}),
        ({"preset": "paddleslim", "selection": "global"}, {"normalisation": "none"}),
        ({"preset": "paddleslim", "group_reduction": "mean"}, {"group_reduction": "mean"}),
        ({"preset": "torch_pruning"}, {"count_rule": "ceil_kept", "normalisation": "mean"}),
        ({"preset": "torch_pruning", "importance": "lamp"}, {"normalisation": "lamp"}),
        ({"preset": "torch_pruning", "count_rule": "round"}, {"count_rule": "round"}),
        ({"preset": "torch_pruning", "rated": "producers"}, {"rated": "producers"}),
        ({"preset": "torch_pruning", "normalisation": "sum"}, {"normalisation": "sum"}),
        ({"preset": "torch_pruning", "importance": "random"}, {"rated": "producers", "group_reduction": "mean"}),
    ],
)
def test_what_a_stage_says_and_what_follows(stage: dict[str, Any], expected: dict[str, Any]) -> None:
    found = definition(**stage)
    assert {key: getattr(found, key) for key in expected} == expected


def test_words_said_aloud_change_nothing_under_a_preset() -> None:
    silent = definition(preset="torch_pruning", importance="l2_norm")
    aloud = definition(preset="torch_pruning", importance="l2_norm", rated="coupled", group_reduction="mean")
    assert silent == aloud


@pytest.mark.parametrize(
    ("importance", "options", "message"),
    [
        ("magnitude", {"power": 2}, r"'power' is no option of importance 'magnitude'.*; it has: p"),
        ("l1_norm", {"p": 2}, r"'p' is no option of importance 'l1_norm'; it has: none"),
        ("magnitude", {"p": "two"}, r"importance_options.p: found 'two', a str; importance 'magnitude' takes a float"),
        ("lamp", {"p": True}, r"importance_options.p: found True, a bool; importance 'lamp' takes a float"),
    ],
)
def test_options_that_do_not_fit(importance: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SlimbridgeError, match=message):
        definition(importance=importance, importance_options=options)


def test_a_whole_number_is_a_float() -> None:
    assert definition(importance="magnitude", importance_options={"p": 1}).options == {"p": 1.0}


def test_a_seed_decides_what_is_random(case: Case) -> None:
    first, again, other = (case.rate(importance="random", seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_groups_of_equal_structure(torch_backend: Backend) -> None:
    def block(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    model = nn.Sequential(block(3, 4, 3), block(4, 6, 3), block(6, 5, 3), block(5, 4, 1), nn.Conv2d(4, 2, 3))
    case = Case(torch_backend, model)
    first, second, third, fourth = structures(case.graph, case.units, case.groups)
    assert first == second, "the numbers of channels are free"
    assert len({second, third, fourth}) == 3, "kernels are not"
