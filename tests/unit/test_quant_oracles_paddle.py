"""Grids and observers against Paddle's operators and PaddleSlim's observers."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.nn.quant.quant_layers import FakeQuantMovingAverageAbsMax
from paddle.static.quantization import PostTrainingQuantization
from paddleslim.quant.observers.abs_max import AbsmaxObserverLayer
from paddleslim.quant.observers.avg import AVGObserverLayer
from paddleslim.quant.observers.emd import EMDObserverLayer
from paddleslim.quant.observers.hist import PercentHistObserverLayer
from paddleslim.quant.observers.mse import MSEObserverLayer

from slimbridge.decisions import QuantParams
from slimbridge.parity import relative, tolerance
from slimbridge.plan.registries import OBSERVERS, Scheme
from slimbridge.ports import Array
from slimbridge.quantize.grid import grid_of, limits_of, to_integers, to_reals
from slimbridge.quantize.histogram import bin_width, histogram_of, statistics_of

RNG = np.random.default_rng(29)
NORMAL = RNG.standard_normal((16, 8, 12, 12)).astype(np.float32)
DATA = {
    "normal": NORMAL,
    "laplace": RNG.laplace(size=NORMAL.shape).astype(np.float32),
    "relu": np.maximum(NORMAL, 0),
    "shifted": NORMAL + 1,
}
OPS: Any = paddle._C_ops
AWAY = 1  # their round_type


def scheme(bits: int = 8, weight: bool = False) -> Scheme:
    return Scheme(bits=bits, weight=weight, definition="paddle")


def limits(name: str, batches: list[Array], symmetric: bool = True, **options: Any) -> tuple[float, float]:
    observer = OBSERVERS.get(name)(**options)
    for batch in batches:
        observer.update(statistics_of(batch, observer.needs_histogram))
    return observer.limits(scheme() if symmetric else Scheme(symmetric=False))


def threshold(layer: Any, batches: list[Array]) -> float:
    """What one of PaddleSlim's observers finds."""
    for batch in batches:
        layer.forward(paddle.to_tensor(batch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, for the way it makes numbers of arrays
        layer.cal_thresholds()
    return float(layer.scales())


# The definition "paddle"


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (16, 32)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_bit_for_bit(shape: tuple[int, ...], scale: float, bits: int) -> None:
    weight = (RNG.standard_normal(shape) * scale).astype(np.float32)
    grid = grid_of(*limits_of(weight, 0), scheme(bits, weight=True), 0)
    tensor = paddle.to_tensor(weight)
    integers, thresholds = OPS.fake_channel_wise_quantize_abs_max(tensor, bits, AWAY, 0, False)
    np.testing.assert_array_equal(to_integers(weight, grid), integers.numpy())
    np.testing.assert_array_equal(np.array(grid.step, np.float32), thresholds.numpy() / np.float32(grid.high))
    reals, _ = OPS.fake_channel_wise_quantize_dequantize_abs_max(tensor, bits, AWAY, 0)
    assert relative(to_reals(to_integers(weight, grid), grid), reals.numpy()) < tolerance("operation").value


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("bits", [8, 4])
def test_activations_bit_for_bit(kind: str, bits: int) -> None:
    values = DATA[kind]
    grid = grid_of(*limits_of(values), scheme(bits))
    integers, _ = OPS.fake_quantize_abs_max(paddle.to_tensor(values), bits, AWAY)
    np.testing.assert_array_equal(to_integers(values, grid), integers.numpy())
    reals, _ = OPS.fake_quantize_dequantize_abs_max(paddle.to_tensor(values), bits, AWAY)
    assert relative(to_reals(to_integers(values, grid), grid), reals.numpy()) < tolerance("operation").value


@pytest.mark.parametrize(("rounding", "kind"), [("away", 1), ("even", 0)])
def test_ties(rounding: Any, kind: int) -> None:
    values = np.array([[127, 0.5, -0.5, 1.5, 2.5, -2.5, 3.49]], np.float32)
    grid = QuantParams(step=(1.0,), low=-127, high=127, axis=0, rounding=rounding)
    integers, _ = OPS.fake_channel_wise_quantize_abs_max(paddle.to_tensor(values), 8, kind, 0, False)
    assert to_integers(values, grid).tolist() == integers.numpy().tolist()


# Observers


BATCHES = [DATA["laplace"] * np.float32(scale) for scale in (1.0, 2.0, 0.5)]


def test_absmax_is_paddleslims() -> None:
    assert limits("absmax", BATCHES)[1] == threshold(AbsmaxObserverLayer(None), BATCHES)


def test_avg_is_paddleslims() -> None:
    expected = threshold(AVGObserverLayer(None), BATCHES)
    np.testing.assert_allclose(limits("avg", BATCHES)[1], expected, rtol=tolerance("statistics").value)


def test_moving_average_starts_as_paddles_operator() -> None:
    layer = FakeQuantMovingAverageAbsMax(moving_rate=0.9)
    layer.train()
    for batch in BATCHES:
        layer(paddle.to_tensor(batch))
    found = limits("moving_average", BATCHES, start="paddle")[1]
    np.testing.assert_allclose(found, layer._scale.numpy().item(), rtol=tolerance("statistics").value)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("share", [0.999, 0.99999])
def test_histogram_is_paddles(kind: str, share: float) -> None:
    """Both give the middle of the bin that the share falls into: half a bin of each apart at most, and a value where
    the sum of their shares misses the count by a rounding."""
    values = np.abs(DATA[kind])
    counts, ends = np.histogram(values, bins=2048, range=(0, float(values.max())))
    expected = PostTrainingQuantization._get_hist_scaling_factor(SimpleNamespace(_hist_percent=share), counts, ends)
    ordered = np.sort(values, axis=None)
    index = int(np.ceil(share * values.size)) - 1
    gap = float(ordered[min(index + 1, values.size - 1)] - ordered[max(index - 1, 0)])
    bound = (ends[1] + bin_width(histogram_of(values))) / 2 + gap
    assert abs(limits("histogram", [DATA[kind]], hist_percent=share)[1] - expected) <= bound


@pytest.mark.parametrize("kind", DATA)
def test_asymmetric_histogram_is_paddleslims_up_to_a_bin_and_a_half(kind: str) -> None:
    """PaddleSlim gives the middle of the bin before that which the share falls into."""
    values = DATA[kind]
    layer = PercentHistObserverLayer(None, percent=0.99)
    threshold(layer, [values])
    low, high = limits("histogram", [values], symmetric=False, hist_percent=0.99)
    bound = 1.5 * float(np.ptp(values)) / 2048 + bin_width(histogram_of(values)) / 2
    ordered = np.sort(values, axis=None)
    index = int(0.01 * values.size)
    gap = float(max(ordered[index + 1] - ordered[index - 1], ordered[-index] - ordered[-index - 2]))
    assert abs(high - float(layer.max_value())) <= bound + gap
    assert abs(low - float(layer.min_value())) <= bound + gap


def grids(values: Array, found: float, expected: float) -> list[Array]:
    """The values on both grids, of PaddleSlim's own: it keeps the lowest integer, -128."""
    grid = grid_of(-found, found, scheme()).model_copy(update={"low": -128})
    other = grid_of(-expected, expected, scheme()).model_copy(update={"low": -128})
    return [to_reals(to_integers(values, g), g).astype(np.float64) for g in (grid, other)]


@pytest.mark.parametrize("kind", DATA)
def test_mse_is_no_worse_than_paddleslims(kind: str) -> None:
    """It compares 0.3 to 1 of the largest magnitude, 0.02 apart."""
    values = DATA[kind]
    expected = threshold(MSEObserverLayer(None), [values])
    found = limits("mse", [values])[1]
    mine, other = (np.mean((q - values) ** 2) for q in grids(values, found, expected))
    assert mine <= other * (1 + tolerance("range_search").value)
    assert abs(found / expected - 1) < tolerance("calibrated_range").value


@pytest.mark.parametrize("kind", DATA)
def test_emd_is_paddleslims_up_to_a_bin(kind: str) -> None:
    """From the same candidates: we know the values to a bin's width, and so the loss."""
    values = DATA[kind] if DATA[kind].max() >= -DATA[kind].min() else -DATA[kind]  # it takes the largest value only
    expected = threshold(EMDObserverLayer(None), [values])
    found = limits("emd", [values])[1]
    share = found / float(values.max())
    assert round(share * 50) / 50 == pytest.approx(share, rel=tolerance("statistics").value)
    mine, other = (
        abs(q.mean() - values.mean(dtype=np.float64)) + abs(q.std() - values.std(dtype=np.float64))
        for q in grids(values, found, expected)
    )
    assert mine <= other + bin_width(histogram_of(values))


def test_paddleslims_emd_ignores_the_negative_side() -> None:
    """The difference to ours: its candidates are shares of the largest value."""
    values = np.where(NORMAL > 0, NORMAL, 3 * NORMAL).astype(np.float32)
    assert threshold(EMDObserverLayer(None), [values]) <= values.max() < -limits("emd", [values])[0]
