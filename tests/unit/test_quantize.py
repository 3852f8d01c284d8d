"""Quantization: the grid, observers, the quantizer and its refusals, int8 files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from slimbridge.decisions import QuantizeDecision, QuantParams, decision_to_json, load_decision
from slimbridge.errors import ModelError, SlimbridgeError
from slimbridge.parity import differing, largest, tolerance
from slimbridge.plan import QuantizeStage
from slimbridge.plan.registries import OBSERVERS
from slimbridge.ports import Array, Backend, Layer
from slimbridge.quantize import (
    Quantizer,
    integer_weights,
    real_weights,
    symmetric_limit,
    symmetric_step,
    to_integers,
    to_reals,
)
from slimbridge.weights import load_stored, load_weights, save_weights

RNG = np.random.default_rng(5)
# Far above the subnormal numbers, where a step has fewer digits.
SIZES = st.floats(2.0**-100, 2.0**20, width=32)
FLOATS = st.one_of(st.just(0.0), SIZES, SIZES.map(lambda value: -value))
X = RNG.standard_normal((4, 3, 4, 4)).astype(np.float32)


def grid_of(weight: Array) -> QuantParams:
    """The grid that the quantizer gives a weight."""
    layer = Layer("w", "linear", {"weight": "w.weight"})
    decision = Quantizer(QuantizeStage()).decide([layer], {"w.weight": weight}, {"w": 1.0})
    return decision.weights["w.weight"]


def small(backend: Backend) -> Any:
    layers = backend.nn
    model = layers.Sequential(layers.Conv2d(3, 4, 3), layers.ReLU(), layers.Flatten(1), layers.Linear(16, 2))
    weights = {name: array.shape for name, array in backend.read(model).items()}
    rng = np.random.default_rng(1)
    return backend.write(
        model, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in weights.items()}
    )


# The grid


@pytest.mark.parametrize(("bits", "limit"), [(2, 1), (4, 7), (8, 127), (16, 32767)])
def test_limit_and_step(bits: int, limit: int) -> None:
    assert symmetric_limit(bits) == limit
    thresholds = np.array([1.0, 0.3, 1e-20, 3e30])
    expected = np.array([np.float32(float(value) / limit) for value in thresholds])
    np.testing.assert_array_equal(symmetric_step(thresholds, bits), expected)


@pytest.mark.parametrize("bits", [1, 0, 17, -8])
def test_word_lengths_outside_two_to_sixteen_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"2\.\.16"):
        symmetric_limit(bits)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_thresholds_that_make_no_sense_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"finite and not negative"):
        symmetric_step(np.array([1.0, bad]), 8)


@pytest.mark.parametrize("tiny", [0.0, 1e-60, 1e-46])
def test_zeros_stay_zeros(tiny: float) -> None:
    """A threshold of 0, or one whose step is 0 in float32, divides nothing by zero."""
    assert symmetric_step(np.array([tiny]), 8) == np.float32(1)
    grid = grid_of(np.zeros((3, 4), np.float32))
    assert grid.step == (1.0, 1.0, 1.0)
    assert not to_reals(to_integers(np.zeros((3, 4), np.float32), grid), grid).any()


@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (5, 7), (8, 1, 3, 3)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_integers_equal_torch_bit_for_bit(shape: tuple[int, ...], scale: float) -> None:
    weight = (RNG.standard_normal(shape) * scale).astype(np.float32)
    grid = grid_of(weight)
    steps, zeros = torch.tensor(grid.step, dtype=torch.float64), torch.zeros(shape[0], dtype=torch.int64)
    theirs = torch.fake_quantize_per_channel_affine(
        torch.from_numpy(weight), steps.float(), zeros.int(), 0, -127, 127
    ).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in PyTorch, and still the reference
        theirs_int8 = torch.quantize_per_channel(torch.from_numpy(weight), steps, zeros, 0, torch.qint8)
    integers = theirs_int8.int_repr().numpy()
    ours = to_integers(weight, grid)
    # Torch multiplies by the reciprocal of the step: a tie that is one only after rounding may fall the other way.
    ties = np.abs(np.abs(weight / np.array(grid.step, np.float32).reshape(-1, *[1] * (weight.ndim - 1)) % 1) - 0.5)
    clear = ties > np.finfo(np.float32).eps * 128
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(ours[clear], np.clip(integers, -127, 127)[clear])
    np.testing.assert_array_equal(to_reals(ours, grid)[clear], theirs[clear])
    assert ours.dtype == np.int8
    assert np.abs(ours.astype(int)).reshape(shape[0], -1).max(1).tolist() == [127] * shape[0]


def test_ties_go_to_even_and_ends_are_clipped() -> None:
    grid = QuantParams(step=(0.5,), low=-127, high=127)
    values = np.array([0.25, 0.75, 1.25, -0.25, -0.75, 100.0, -100.0, 63.75], np.float32)
    assert to_integers(values, grid).tolist() == [0, 2, 2, 0, -2, 127, -127, 127]


def test_a_zero_point_moves_the_integers() -> None:
    grid = QuantParams(step=(0.5,), zero_point=3, low=-128, high=127)
    values = np.array([0.0, 1.0, -1.0, 500.0], np.float32)
    assert to_integers(values, grid).tolist() == [3, 5, 1, 127]
    assert to_reals(to_integers(values, grid), grid).tolist() == [0.0, 1.0, -1.0, 62.0]


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=FLOATS))
def test_a_round_trip_is_off_by_half_a_step_at_most(weight: Array) -> None:
    """In exact arithmetic half a step; the division and the product in float32 add a rounding of the value each."""
    grid = grid_of(weight)
    steps = np.array(grid.step, np.float64).reshape(-1, *[1] * (weight.ndim - 1))
    error = np.abs(to_reals(to_integers(weight, grid), grid).astype(np.float64) - weight)
    assert (error <= steps / 2 + 2 * np.finfo(np.float32).eps * np.abs(weight)).all()


@given(hnp.arrays(np.float32, (3, 5), elements=FLOATS))
def test_quantizing_twice_changes_nothing(weight: Array) -> None:
    grid = grid_of(weight)
    once = to_reals(to_integers(weight, grid), grid)
    np.testing.assert_array_equal(to_reals(to_integers(once, grid), grid), once)


# Observers


def batches_of(seed: int) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((4, 5)) * rng.uniform(0.5, 2)).astype(np.float32) for _ in range(6)]


def observed(name: str, batches: list[Array], **options: float) -> float:
    observer = OBSERVERS.get(name)(**options)
    for batch in batches:
        observer.update({"absmax": float(np.abs(batch).max()), "min": float(batch.min()), "max": float(batch.max())})
    return observer.threshold()


@pytest.mark.parametrize("seed", range(3))
def test_absmax_equals_torch_min_max(seed: int) -> None:
    from torch.ao.quantization import MinMaxObserver

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        for batch in batches_of(seed):
            theirs(torch.from_numpy(batch))
    assert observed("absmax", batches_of(seed)) == max(-float(theirs.min_val), float(theirs.max_val))


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9, 0.99])
def test_moving_average_equals_torch(rate: float) -> None:
    """Torch averages minimum and maximum apart: on magnitudes, both are the average of the largest magnitudes."""
    from torch.ao.quantization import MovingAverageMinMaxObserver

    batches = [np.abs(batch) for batch in batches_of(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = MovingAverageMinMaxObserver(averaging_constant=1 - rate)
        for batch in batches:
            theirs(torch.from_numpy(batch))
    found, expected = observed("moving_average", batches, rate=rate), float(theirs.max_val)
    assert abs(found - expected) / expected <= tolerance("operation").value


def test_moving_average_by_hand() -> None:
    batches = [np.array([4.0]), np.array([-2.0]), np.array([1.0])]
    assert observed("moving_average", batches, rate=0.5) == ((4 + 2) / 2 + 1) / 2
    assert OBSERVERS.get("moving_average")().threshold() == 0.0


@pytest.mark.parametrize("rate", [1.0, -0.1, 2.0])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(SlimbridgeError, match=r"rate must be 0 to below 1"):
        OBSERVERS.get("moving_average")(rate=rate)


# The quantizer


def test_a_model_of_any_framework(backend: Backend) -> None:
    """Thresholds from the inputs that NumPy sees, weights on their grid, activations on theirs."""
    model = small(backend)
    weights, quantizer = backend.read(model), Quantizer(QuantizeStage(observer="absmax"))
    layers = backend.layers(model)
    thresholds = quantizer.observe(backend, model, layers, [[X], [2 * X]])
    assert thresholds["0"] == float(np.abs(2 * X).max())
    decision = quantizer.decide(layers, weights, thresholds)
    assert decision.activations["0"].step == (float(np.float32(thresholds["0"] / 127)),)
    quantized = quantizer.apply(backend, backend.clone(model), decision)
    expected = real_weights(decision, integer_weights(decision, weights))
    after = backend.read(quantized)
    assert differing({name: after[name] for name in expected}, expected) <= tolerance("integers").value
    assert differing({"b": after["0.bias"]}, {"b": weights["0.bias"]}) == 0, "a bias stays in float"
    assert differing(backend.read(model), weights) == 0
    assert set(expected) == {"0.weight", "3.weight"}


def test_ignored_layers_stay_in_float(torch_backend: Backend) -> None:
    model = small(torch_backend)
    quantizer = Quantizer(QuantizeStage(ignored_layers=("3",)))
    chosen, skipped = quantizer.chosen(torch_backend.layers(model))
    assert [layer.path for layer in chosen] == ["0"]
    assert [(item.layer, item.reason) for item in skipped] == [("3", "ignored_layers names it")]


def test_a_wrong_pattern_gets_the_nearest() -> None:
    layers = [Layer("stem", "conv", {"weight": "stem.weight"}), Layer("head", "linear", {"weight": "head.weight"})]
    with pytest.raises(ModelError, match=r"'haed' matches none of the 2 .* \(did you mean 'head'\?\); they are: stem"):
        Quantizer(QuantizeStage(ignored_layers=("haed",))).chosen(layers)


def test_nothing_to_quantize_is_an_error(torch_backend: Backend) -> None:
    with pytest.raises(ModelError, match=r"nothing to quantize: 0 convolution and linear layers found, 0 ignored"):
        Quantizer(QuantizeStage()).chosen(torch_backend.layers(nn.BatchNorm2d(3)))
    with pytest.raises(ModelError, match=r"nothing to quantize: 2 .* found, 2 ignored"):
        Quantizer(QuantizeStage(ignored_layers=("*",))).chosen(torch_backend.layers(small(torch_backend)))
    layers = torch_backend.layers(small(torch_backend))
    with pytest.raises(ModelError, match=r"the calibration ran none of 2 layers"):
        Quantizer(QuantizeStage()).decide(layers, {}, {})


def test_a_layer_that_did_not_run_is_skipped_and_named(torch_backend: Backend) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Any) -> Any:
            return self.used(x)

    model, quantizer = Aside(), Quantizer(QuantizeStage())
    layers = torch_backend.layers(model)
    thresholds = quantizer.observe(torch_backend, model, layers, [[X]])
    decision = quantizer.decide(layers, torch_backend.read(model), thresholds)
    assert set(decision.activations) == {"used"}
    assert [(item.layer, item.reason) for item in decision.skipped] == [
        ("unused", "the calibration batches did not run it")
    ]


def test_calibration_without_batches_or_with_what_is_not_finite(torch_backend: Backend) -> None:
    model, quantizer = small(torch_backend), Quantizer(QuantizeStage())
    layers = torch_backend.layers(model)
    with pytest.raises(SlimbridgeError, match=r"gave no batch"):
        quantizer.observe(torch_backend, model, layers, [])
    bad = X.copy()
    bad[0, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match=r"calibration batch 2: the input of layer '0' is not finite"):
        quantizer.observe(torch_backend, model, layers, [[X], [bad]])


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match=r"layer 'w': 1 of 6 entries"):
        grid_of(np.array([[1, 2, np.nan], [4, 5, 6]], np.float32))


def test_an_unknown_option_of_an_observer() -> None:
    stage = QuantizeStage(observer_options={"rat": 0.5})
    with pytest.raises(SlimbridgeError, match=r"'moving_average' has no option 'rat' \(did you mean 'rate'\?\)"):
        Quantizer(stage).new_observer()


# Files


def test_an_int8_file_reads_back_equal(backend: Backend, tmp_path: Path) -> None:
    model, quantizer = small(backend), Quantizer(QuantizeStage())
    layers, weights = backend.layers(model), backend.read(model)
    decision = quantizer.decide(layers, weights, {"0": 1.0, "3": 2.0})
    after = backend.read(quantizer.apply(backend, model, decision))
    save_weights(tmp_path / "w.safetensors", after, decision)
    assert differing(load_weights(tmp_path / "w.safetensors"), after) == 0
    stored = load_stored(tmp_path / "w.safetensors")
    assert stored["0.weight"].dtype == np.int8
    assert (
        differing({"0.weight": stored["0.weight"]}, {"0.weight": integer_weights(decision, weights)["0.weight"]}) == 0
    )
    (tmp_path / "d.json").write_text(decision_to_json(decision))
    loaded = load_decision(tmp_path / "d.json")
    assert isinstance(loaded, QuantizeDecision)
    assert loaded == decision
    assert loaded.digest() == decision.digest()


def test_an_int8_file_is_about_a_quarter(tmp_path: Path) -> None:
    weight = RNG.standard_normal((64, 256)).astype(np.float32)
    layer = Layer("w", "linear", {"weight": "w.weight"})
    decision = Quantizer(QuantizeStage()).decide([layer], {"w.weight": weight}, {"w": 1.0})
    save_weights(tmp_path / "int8", {"w.weight": weight}, decision)
    save_weights(tmp_path / "float", {"w.weight": weight})
    sizes = [(tmp_path / name).stat().st_size for name in ("int8", "float")]
    assert sizes[0] < 0.3 * sizes[1]
    error = largest(load_weights(tmp_path / "int8")["w.weight"], weight)
    assert error <= max(decision.weights["w.weight"].step)
