"""What quantization-aware training decides in the end, and how it is steered; without a framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slimbridge.decisions import QuantParams
from slimbridge.errors import ModelError
from slimbridge.parity import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.plan import QuantizeStage
from slimbridge.ports import Array
from slimbridge.quantize import Quantizer, integer_weights, real_weights, to_integers
from slimbridge.quantize.fold import fold_weights
from slimbridge.quantize.learned import LSQ, PACT, LSQPlus
from slimbridge.quantize.qat import Qat
from slimbridge.quantize.ranges import AbsMax, Folded, MovingAverage
from tests.handmade import Made

RNG = np.random.default_rng(7)
TRAIN = {"epochs": 2, "batch_size": 8, "learning_rate": 0.1}
SIGNED = QuantParams(step=(0.125,), low=-128, high=127)
UNSIGNED = QuantParams(step=(0.0625,), low=0, high=255)


def made() -> Made:
    net = Made(1, 3, 4, 4)
    x = net.act(net.norm(net.conv(net.x, "conv", 6), "bn"), "relu")
    net.linear(net.flatten(net.pool(x, "pool", "avg", 1)), "fc")
    return net


def weights() -> dict[str, Array]:
    """A negative scale and one of 0 among those of the norm."""
    found = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in made().parameters.items()}
    found["bn.running_var"] = np.abs(found["bn.running_var"]) + np.float32(0.1)
    found["bn.weight"][:3] = -1.5, 0, 2
    return found


def training(values: dict[str, Array], grid: QuantParams = SIGNED, **section: Any) -> Qat:
    more = {name: section.pop(name) for name in tuple(section) if name not in SECTION}
    stage = QuantizeStage.model_validate({**more, "qat": {"train": TRAIN, **section}})
    net = made()
    quantizer = Quantizer(stage, list(net.layers.values()), net.graph())
    return Qat(quantizer, values, dict.fromkeys(quantizer.placement.sites, grid))


SECTION = (
    *("activation_ranges", "weight_ranges", "batch_norm", "rate"),
    *("freeze_batch_norm_after", "freeze_ranges_after"),
)


def trained(qat: Qat, values: dict[str, Array], factor: float = 1.0) -> dict[str, Array]:
    """All that a model holds in the end; what the fake quantizations keep times a factor."""
    held = {}
    for site, quant in qat.quants.items():
        for name, start in {**quant.parameters, **quant.buffers}.items():
            held[f"{site.path}.{site.held(name)}"] = np.asarray(start * np.float32(factor))
    return {**values, **held}


GRANULARITIES: list[dict[str, Any]] = [
    {"weight_granularity": "channel"},
    {"weight_granularity": "tensor"},
    {"weight_granularity": "group", "group_size": 1},
    {"weight_bits": 4},
    {"weight_bits": 2, "weight_granularity": "tensor"},
    {"weight_ranges": "lsq", "weight_bits": 3},
    {"weight_ranges": "lsq", "weight_bits": 3, "weight_granularity": "tensor"},
]


@pytest.mark.parametrize("stage", GRANULARITIES)
def test_folding_keeps_the_integers_that_were_trained(stage: dict[str, Any]) -> None:
    """But for their sign where the scale is negative; a channel that the norm takes to 0 has integers 0."""
    values = weights()
    qat = training(values, **stage)
    values = trained(qat, values)
    target = qat.quantizer.targets[0]
    state = {name.rpartition("_")[2]: array for name, array in values.items() if "conv.quant_weight" in name}
    before = to_integers(values["conv.weight"], qat._weights[target].grid({"weight": values["conv.weight"], **state}))
    decision, real = qat.decide(values)
    assert set(real) == {"conv.weight"}
    folded = fold_weights({**values, **real}, decision.folds)
    after = integer_weights(decision, {**values, **folded})["conv.weight"]
    sign = np.sign(values["bn.weight"]).astype(np.int8).reshape(-1, 1, 1, 1)
    assert np.array_equal(after, before * sign)
    assert after[0].any()
    assert not after[1].any()
    grid = decision.weights["conv.weight"]
    steps = {"group": 27 * 6, "channel": 6, "tensor": 6}[qat.quantizer.stage.weight_granularity]
    assert (len(grid.step), grid.axis, len(grid.zero_point)) == (steps, 0, steps)


def test_the_folded_layer_computes_what_the_trained_one_did() -> None:
    values = weights()
    qat = training(values)
    values = trained(qat, values)
    on_grid = AbsMax(8, 0).grid({"weight": values["conv.weight"]})
    integers = to_integers(values["conv.weight"], on_grid).astype(np.float64)
    quantized = integers * np.array(on_grid.step).reshape(-1, 1, 1, 1)
    factor = values["bn.weight"].astype(np.float64) / np.sqrt(values["bn.running_var"].astype(np.float64) + 1e-5)
    expected = quantized * factor.reshape(-1, 1, 1, 1)
    decision, real = qat.decide(values)
    folded = fold_weights({**values, **real}, decision.folds)
    found = real_weights(decision, integer_weights(decision, {**values, **folded}))["conv.weight"]
    assert relative(found, expected) <= tolerance("operation").value


def test_a_scale_near_zero_keeps_its_channel_at_zero() -> None:
    """A step that would be no normal float32 number is 1, and the integers 0."""
    values = weights()
    values["bn.weight"][1] = 1e-38
    qat = training(values)
    values = trained(qat, values)
    decision, real = qat.decide(values)
    assert decision.weights["conv.weight"].step[1] == 1
    folded = fold_weights({**values, **real}, decision.folds)
    assert not integer_weights(decision, {**values, **folded})["conv.weight"][1].any()


def test_a_norm_that_was_folded_in_training() -> None:
    """The grid is that of the folded weight; nothing is written before folding."""
    values = weights()
    qat = training(values, batch_norm="fold")
    assert isinstance(qat.quants[next(site for site in qat.quants if str(site) == "conv:weight")], Folded)
    decision, real = qat.decide(trained(qat, values))
    assert not real
    folded = fold_weights(values, decision.folds)["conv.weight"]
    step = np.abs(folded.reshape(6, -1)).max(1) / np.float32(127)
    expected = tuple(np.where(step > 0, step, np.float32(1)).tolist())
    assert decision.weights["conv.weight"].step == expected


def test_weights_without_a_norm_keep_their_grid() -> None:
    values = weights()
    qat = training(values, weight_bits=4)
    decision, _ = qat.decide(trained(qat, values))
    expected = tuple((np.abs(values["fc.weight"]).max(1) / np.float32(7)).tolist())
    assert decision.weights["fc.weight"].step == expected
    assert decision.observer == "qat moving_average"


@pytest.mark.parametrize("grid", [SIGNED, UNSIGNED])
@pytest.mark.parametrize("ranges", ["moving_average", "lsq", "pact"])
def test_ranges_start_where_calibration_left_them(ranges: str, grid: QuantParams) -> None:
    values = weights()
    qat = training(values, grid, activation_ranges=ranges)
    decision, _ = qat.decide(trained(qat, values))
    kinds = {"moving_average": MovingAverage, "lsq": LSQ, "pact": PACT}
    assert all(isinstance(quant, kinds[ranges]) for site, quant in qat.quants.items() if site.side != "weight")
    found = decision.activations["conv"]
    assert found.step == grid.step
    assert (found.high, found.zero_point) == (grid.high, (0,))
    assert found.low == (grid.low if ranges != "pact" else min(grid.low + 1, 0))


@pytest.mark.parametrize("ranges", ["moving_average", "lsq_plus"])
def test_asymmetric_ranges_start_where_calibration_left_them(ranges: str) -> None:
    grid = QuantParams(step=(0.125,), zero_point=(100,), low=0, high=255)
    values = weights()
    qat = training(values, grid, activation_ranges=ranges, activation_scheme="asymmetric")
    if ranges == "lsq_plus":
        assert all(isinstance(quant, LSQPlus) for site, quant in qat.quants.items() if site.side != "weight")
    decision, _ = qat.decide(trained(qat, values))
    assert decision.activations["conv"] == grid


def test_learned_weight_steps_start_without_clipping_at_8_bits() -> None:
    values = weights()
    (start,) = (
        quant.parameters["step"]
        for site, quant in training(values, weight_ranges="lsq").quants.items()
        if str(site) == "fc:weight"
    )
    assert np.array_equal(start, np.abs(values["fc.weight"]).max(1) / np.float32(127))


class Holding:
    """A backend that keeps what it is told of statistics."""

    def __init__(self) -> None:
        self.held: list[bool] = []

    def hold_statistics(self, model: Any, hold: bool) -> Any:
        self.held.append(hold)
        return model


@pytest.mark.parametrize(
    ("norms", "ranges", "first"),
    [(0.5, 0.75, (8, 12)), (0.0, 0.0, (0, 0)), (1.0, 1.0, (16, 16)), (0.3, 1.0, (5, 16))],
)
def test_what_is_frozen_when(norms: float, ranges: float, first: tuple[int, int]) -> None:
    """Two epochs of eight steps; `first` are the first steps with statistics and with ranges frozen."""
    qat = training(weights(), freeze_batch_norm_after=norms, freeze_ranges_after=ranges)
    backend, frozen = Holding(), []
    steer = qat.steering(backend, TRAIN["epochs"])  # type: ignore[arg-type]
    for number in range(16):
        steer(None, None, number, 8)  # type: ignore[arg-type]
        (state,) = {quant.frozen for quant in qat.quants.values()}
        frozen.append(state)
    assert backend.held == [number >= first[0] for number in range(16)]
    assert frozen == [number >= first[1] for number in range(16)]


def test_what_is_not_finite_is_told() -> None:
    values = weights()
    bad = {**values, "fc.weight": values["fc.weight"] * np.float32(np.nan)}
    with pytest.raises(ModelError, match=r"layer 'fc': 12 of 12 entries of its weight are not finite"):
        training(bad)
    qat = training(values, activation_ranges="lsq")
    broken = trained(qat, {**values, "conv.weight": values["conv.weight"].copy()})
    broken["conv.weight"][0, 0, 0, 0] = np.inf
    with pytest.raises(ModelError, match=r"layer 'conv': 1 of 162 entries"):
        qat.decide(broken)
    with pytest.raises(ModelError, match=r"the training left the step of 'conv' at a value that is not finite"):
        qat.decide({**trained(qat, values), "conv.quant_input_step": np.asarray(np.nan, np.float32)})
    for batch_norm in ("keep", "fold"):
        qat = training(values, batch_norm=batch_norm)
        broken = trained(qat, {**values, "bn.running_var": -values["bn.running_var"]})
        with pytest.raises(ModelError, match=r"'conv': 162 of 162 entries of its weight with the BatchNorm folded in"):
            qat.decide(broken)
