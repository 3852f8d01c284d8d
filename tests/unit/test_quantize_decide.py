"""Which layers a quantize stage takes, and the grids that it decides for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slimbridge.decisions import DynamicGrid, QuantizeDecision, QuantParams, Site
from slimbridge.errors import ModelError, SlimbridgeError
from slimbridge.plan import QuantizeStage
from slimbridge.plan.registries import OBSERVERS
from slimbridge.ports import Array, Statistics
from slimbridge.quantize import Quantizer, integer_weights, real_weights
from slimbridge.quantize.quantizer import new_observer
from tests.handmade import Made

RNG = np.random.default_rng(11)


def net() -> Made:
    """Two convolutions, the first with a norm behind it, a transposed one, two linear layers."""
    made = Made(1, 3, 4, 4)
    x = made.act(made.norm(made.conv(made.x, "stem"), "bn"), "relu")
    x = made.conv(made.conv(x, "mid", bias=True), "up", transposed=True)
    x = made.flatten(made.pool(x, "pool", "avg", 1))
    made.linear(made.linear(x, "fc1", 6), "fc2", 2)
    return made


def quantizer(made: Made | None = None, **stage: Any) -> Quantizer:
    made = made or net()
    return Quantizer(QuantizeStage(**stage), list(made.layers.values()), made.graph())


def weights(made: Made | None = None) -> dict[str, Array]:
    """Random ones for all parameters; a variance is positive."""
    found = {}
    for name, shape in (made or net()).parameters.items():
        found[name] = RNG.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            found[name] = np.abs(found[name]) + np.float32(0.1)
    return found


def observed(found: Quantizer, low: float = -1.0, high: float = 2.0) -> dict[Site, Any]:
    """What each site's observer saw."""
    seen = {}
    for site in found.placement.sites:
        seen[site] = new_observer(found.stage)
        seen[site].update(Statistics(low, high, max(-low, high)))
    return seen


# Which layers


def test_layers_in_the_order_in_which_they_run() -> None:
    made = net()
    made.layers = dict(reversed(made.layers.items()))
    found = quantizer(made)
    assert [target.path for target in found.targets] == ["stem", "mid", "fc1", "fc2"]
    assert [target.weight for target in found.targets][:2] == ["stem.weight", "mid.weight"]
    (up,) = found.skipped
    assert (up.layer, "no runtime computes it in integers" in up.reason) == ("up", True)


@pytest.mark.parametrize(
    ("stage", "left", "reasons"),
    [
        ({"first_layer": "float"}, ["mid", "fc1", "fc2"], {"stem": "first_layer is float"}),
        ({"last_layer": "float"}, ["stem", "mid", "fc1"], {"fc2": "last_layer is float"}),
        (
            {"first_layer": "float", "last_layer": "float", "ignored_layers": ("fc1",)},
            ["mid"],
            {"stem": "first_layer is float", "fc2": "last_layer is float", "fc1": "ignored_layers names it"},
        ),
        ({"ignored_layers": ("fc*", "up")}, ["stem", "mid"], dict.fromkeys(("up", "fc1", "fc2"), "ignored_layers")),
        ({"mode": "dynamic"}, ["fc1", "fc2"], dict.fromkeys(("stem", "mid"), "mode dynamic is for linear layers")),
    ],
)
def test_layers_that_stay_in_float(stage: dict[str, Any], left: list[str], reasons: dict[str, str]) -> None:
    found = quantizer(**stage)
    assert [target.path for target in found.targets] == left
    told = {item.layer: item.reason for item in found.skipped}
    assert set(told) - {"up"} == set(reasons) - {"up"}
    assert all(told[path].startswith(reason) for path, reason in reasons.items())


def test_a_layer_that_no_pass_runs_stays() -> None:
    made = net()
    graph = made.graph()
    made.conv(made.x, "aside")
    found = Quantizer(QuantizeStage(), list(made.layers.values()), graph)
    assert [item.layer for item in found.skipped] == ["up", "aside"]
    assert found.skipped[1].reason == "a forward pass does not run it as a layer"


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ModelError, match=r"'stme' matches none of the 5 .* \(did you mean 'stem'\?\); they are: stem"):
        quantizer(ignored_layers=("fc1", "stme"))


def test_nothing_left_to_quantize() -> None:
    with pytest.raises(ModelError, match=r"nothing to quantize: 0 of 5 .* are left \(ignored_layers names it\)"):
        quantizer(ignored_layers=("*",))
    with pytest.raises(ModelError, match=r"0 of 5 .*first_layer is float, ignored_layers names it"):
        quantizer(first_layer="float", ignored_layers=("mid", "up", "fc?"))
    made = Made(1, 3, 4, 4)
    made.norm(made.x, "bn")
    with pytest.raises(ModelError, match=r"nothing to quantize: 0 of 0 convolution and linear layers are left$"):
        quantizer(made)
    convs = Made(1, 3, 4, 4)
    convs.conv(convs.x, "only")
    with pytest.raises(ModelError, match=r"0 of 1 .* \(mode dynamic is for linear layers\)"):
        quantizer(convs, mode="dynamic")


def test_ends_of_eight_bits() -> None:
    """Their weights, and the tensors that they read, whoever else reads those."""
    found = quantizer(weight_bits=4, activation_bits=3, first_layer="8bit", last_layer="8bit")
    assert [found.weight_bits(target.path) for target in found.targets] == [8, 4, 4, 8]
    bits = {str(site): found.scheme(site).bits for site in found.placement.sites}
    assert {bits[str(site)] for site in found.placement.reads["stem"]} == {8}
    assert {bits[str(site)] for site in found.placement.reads["fc2"]} == {8}
    assert {bits[str(site)] for site in found.placement.reads["mid"]} == {3}


# The grids, against NumPy


def folded(values: dict[str, Array]) -> Array:
    """The stem's weight with its norm, in float64, rounded once."""
    factor = values["bn.weight"].astype(np.float64) / np.sqrt(values["bn.running_var"].astype(np.float64) + 1e-5)
    return np.asarray(values["stem.weight"].astype(np.float64) * factor[:, None, None, None], np.float32)


def by_numpy(weight: Array, stage: QuantizeStage, bits: int = 8) -> tuple[Array, Array, Array]:
    """Integers, steps and zero points, by the definition."""
    size = {"channel": weight[0].size, "tensor": weight.size, "group": stage.group_size or 0}[stage.weight_granularity]
    rows = weight.reshape(-1, size).astype(np.float64)
    top = 2 ** (bits - 1) - 1
    if stage.weight_scheme == "symmetric":
        step, zero = np.float32(np.abs(rows).max(1) / top), np.zeros(len(rows))
        bottom = -top
    else:
        low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
        bottom = -top - 1
        step = np.float32((high - low) / (2**bits - 1))
        zero = bottom + np.rint(-low / step.astype(np.float64))
    quotient = rows.astype(np.float32) / step[:, None]
    integers = np.clip(np.rint(quotient) + zero[:, None], bottom, top).reshape(weight.shape)
    return integers, step, zero


@pytest.mark.parametrize(
    "stage",
    [
        {},
        {"weight_granularity": "tensor"},
        {"weight_granularity": "group", "group_size": 1},
        {"weight_scheme": "asymmetric"},
        {"weight_scheme": "asymmetric", "weight_granularity": "tensor"},
        {"weight_bits": 4},
        {"weight_bits": 4, "weight_scheme": "asymmetric"},
        {"weight_bits": 2},
        {"mode": "weight_only"},
    ],
)
def test_weights_equal_numpy(stage: dict[str, Any]) -> None:
    found, values = quantizer(**stage), weights()
    decision = found.decide(values, observed(found) if found.stage.mode == "static" else {})
    real = {**values, "stem.weight": folded(values)}
    integers = integer_weights(decision, real)
    assert set(integers) == {"stem.weight", "mid.weight", "fc1.weight", "fc2.weight"}
    for name, grid in decision.weights.items():
        expected, step, zero = by_numpy(real[name], found.stage, found.stage.weight_bits)
        assert np.array_equal(integers[name], expected), name
        assert integers[name].dtype == np.int8
        assert grid.step == tuple(step.tolist())
        assert np.array_equal(np.broadcast_to(grid.zero_point, zero.shape), zero)
        back = real_weights(decision, integers)[name]
        rows = (expected.reshape(len(step), -1) - zero[:, None]).astype(np.float32) * step[:, None]
        assert np.array_equal(back, rows.reshape(back.shape))
    assert [fold.weight for fold in decision.folds] == ["stem.weight"]


def test_groups_that_divide_and_one_that_does_not() -> None:
    made = Made(1, 8)
    made.linear(made.linear(made.x, "a", 6), "b")
    found = quantizer(made, weight_granularity="group", group_size=2, mode="weight_only")
    values = weights(made)
    grid = found.decide(values, {}).weights["a.weight"]
    assert (len(grid.step), grid.group, grid.axis) == (24, 2, 0)
    integers, step, _ = by_numpy(values["a.weight"], found.stage)
    assert grid.step == tuple(step.tolist())
    assert np.array_equal(integer_weights(found.decide(values, {}), values)["a.weight"], integers)
    other = quantizer(made, weight_granularity="group", group_size=4, mode="weight_only")
    with pytest.raises(ModelError, match=r"group_size 4 does not divide the 6 weights of a channel of 'b'; ignored_"):
        other.decide(values, {})


def test_activations_equal_numpy() -> None:
    """Signed, and unsigned where nothing is negative; asymmetric ones reach from end to end."""
    grids = []
    for stage, low in (({}, -1.0), ({}, 0.0), ({"activation_scheme": "asymmetric"}, -1.0), ({"activation_bits": 4}, 0)):
        found = quantizer(**stage)
        grids.append(found.decide(weights(), observed(found, low)).activations["stem"])
    steps = [np.float32(2 / 127), np.float32(2 / 255), np.float32(3 / 255), np.float32(2 / 15)]
    assert [grid.step for grid in grids] == [(float(step),) for step in steps]
    assert [(grid.low, grid.high, grid.zero_point) for grid in grids] == [
        *((-128, 127, (0,)), (0, 255, (0,)), (0, 255, (85,)), (0, 15, (0,)))
    ]


def test_modes() -> None:
    values = weights()
    dynamic = quantizer(mode="dynamic", activation_scheme="asymmetric").decide(values, {})
    assert dynamic.dynamic == dict.fromkeys(("fc1", "fc2"), DynamicGrid(low=0, high=255, symmetric=False))
    assert (dynamic.activations, dynamic.folds) == ({}, ())
    weight_only = quantizer(mode="weight_only").decide(values, {})
    assert (weight_only.activations, weight_only.dynamic) == ({}, {})
    unfolded = quantizer(mode="weight_only", fold_batch_norm=False).decide(values, {})
    assert unfolded.folds == ()
    assert unfolded.weights["stem.weight"] != weight_only.weights["stem.weight"]


def test_layers_that_calibration_never_ran() -> None:
    found = quantizer(placement="layer")
    seen = observed(found)
    del seen[Site("mid")]
    decision = found.decide(weights(), seen)
    assert "mid.weight" not in decision.weights
    assert decision.skipped[-1].layer == "mid"
    with pytest.raises(ModelError, match=r"nothing to quantize: the calibration ran none of 4 layers"):
        found.decide(weights(), {})


@pytest.mark.parametrize("mode", ["static", "weight_only"])
def test_weights_that_are_not_finite(mode: str) -> None:
    found, values = quantizer(mode=mode), weights()
    seen = observed(found) if mode == "static" else {}
    bad = {**values, "mid.weight": values["mid.weight"].copy()}
    bad["mid.weight"][0, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match=r"layer 'mid': 1 of 144 entries of its weight are not finite"):
        found.decide(bad, seen)
    bad = {**values, "bn.running_var": -values["bn.running_var"]}
    with pytest.raises(ModelError, match=r"'stem': 108 of 108 entries of its weight with the BatchNorm folded in are"):
        found.decide(bad, seen)


# Observers


@pytest.mark.parametrize("name", OBSERVERS.names())
def test_options_that_an_observer_has_not(name: str) -> None:
    with pytest.raises(SlimbridgeError, match=rf"observer '{name}' has no option 'colour'.*; allowed: ") as caught:
        new_observer(QuantizeStage(observer=name, observer_options={"colour": 1}))
    assert len(str(caught.value).splitlines()) == 1
    assert new_observer(QuantizeStage(observer=name)).limits(quantizer().scheme(Site("stem"))) == (0, 0)


def test_options_of_the_wrong_value() -> None:
    with pytest.raises(SlimbridgeError, match=r"\(did you mean 'rate'\?\)"):
        new_observer(QuantizeStage(observer_options={"rat": 0.5}))
    for value in (1.5, -1, "much"):
        with pytest.raises(SlimbridgeError, match=r"rate|moving_average"):
            new_observer(QuantizeStage(observer_options={"rate": value}))


class Reducing:
    """A backend that reduces as it is told."""

    def __init__(self, low: float) -> None:
        self.low = low

    def reduce(self, model: Any, inputs: Any, wanted: Any, histogram: bool) -> dict[Site, Statistics]:
        return {site: Statistics(self.low * inputs[0], 1.0, 1.0) for site in wanted}


def test_calibration_without_batches_or_with_what_is_not_finite() -> None:
    found = quantizer()
    with pytest.raises(SlimbridgeError, match=r"calibration: the training data gave no batch"):
        found.observe(Reducing(-1), None, [])  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"calibration batch 2: the tensor 'stem' is not finite"):
        found.observe(Reducing(-1), None, [[1.0], [np.inf]])  # type: ignore[arg-type, list-item]
    assert len(found.observe(Reducing(-1), None, [[1.0]])) == len(found.placement.sites)  # type: ignore[arg-type, list-item]


def test_a_decision_names_its_observer() -> None:
    found = quantizer(observer="absmax")
    decision = found.decide(weights(), observed(found))
    assert isinstance(decision, QuantizeDecision)
    assert decision.observer == "absmax"
    assert all(isinstance(grid, QuantParams) for grid in decision.activations.values())
