"""Grids and observers against torch.ao.quantization's own."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from slimbridge.decisions import QuantParams
from slimbridge.parity import tolerance
from slimbridge.plan.registries import OBSERVERS, Observer, Scheme
from slimbridge.ports import Array
from slimbridge.quantize.grid import grid_of, limits_of, step_array, to_integers, to_reals, zero_point_array
from slimbridge.quantize.histogram import statistics_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated in PyTorch, and still the reference
    from torch.ao.quantization import observer as reference

RNG = np.random.default_rng(17)
TORCH_EPS = np.finfo(np.float32).eps
QSCHEMES: dict[tuple[bool, bool], Any] = {
    (True, True): torch.per_channel_symmetric,
    (True, False): torch.per_channel_affine,
    (False, True): torch.per_tensor_symmetric,
    (False, False): torch.per_tensor_affine,
}


def sample(kind: str) -> Array:
    values = {
        "normal": RNG.standard_normal((16, 6, 3, 3)),
        "small": RNG.standard_normal((16, 6, 3, 3)) * 1e-9,
        "large": RNG.laplace(size=(16, 6, 3, 3)) * 300,
        "positive": np.abs(RNG.standard_normal((16, 6, 3, 3))) + 0.1,
        "negative": -np.abs(RNG.standard_normal((16, 6, 3, 3))) - 0.1,
        "zero": np.zeros((16, 6, 3, 3)),
    }[kind]
    return values.astype(np.float32)


def qparams(name: str, batches: list[Array], scheme: Scheme, **options: Any) -> tuple[Array, Array]:
    """Steps and zero points of one of torch's observers; the range of integers is given where it is not the type's."""
    middle = 2 ** (scheme.bits - 1) if scheme.weight else 0
    if scheme.bits < 8:
        options |= {"quant_min": -middle, "quant_max": 2**scheme.bits - 1 - middle}
    qscheme = QSCHEMES["PerChannel" in name, scheme.symmetric]
    dtype = torch.qint8 if scheme.weight else torch.quint8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = getattr(reference, name)(dtype=dtype, qscheme=qscheme, **options)
        for batch in batches:
            observer(torch.from_numpy(batch))
        step, zero = observer.calculate_qparams()
    return step.numpy(), zero.numpy()


def observed(name: str, batches: list[Array], **options: Any) -> Observer:
    observer = OBSERVERS.get(name)(**options)
    for batch in batches:
        observer.update(statistics_of(batch, observer.needs_histogram))
    return observer


@pytest.mark.parametrize("kind", ["normal", "small", "large", "positive", "negative", "zero"])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_of_the_definition_torch_bit_for_bit(kind: str, bits: int, symmetric: bool) -> None:
    values = sample(kind)
    for weight, name in ((True, "PerChannelMinMaxObserver"), (False, "MinMaxObserver")):
        scheme = Scheme(bits=bits, symmetric=symmetric, weight=weight, definition="torch")
        axis = 0 if weight else None
        grid = grid_of(*limits_of(values, axis), scheme, axis)
        step, zero = qparams(name, [values], scheme)
        np.testing.assert_array_equal(np.array(grid.step, np.float32), step)
        np.testing.assert_array_equal(np.broadcast_to(grid.zero_point, zero.shape), zero)


def test_another_channel_axis() -> None:
    values = sample("normal")
    scheme = Scheme(weight=True, definition="torch")
    step, _ = qparams("PerChannelMinMaxObserver", [values], scheme, ch_axis=1)
    np.testing.assert_array_equal(np.array(grid_of(*limits_of(values, 1), scheme, 1).step, np.float32), step)


def clear_of_ties(values: Array, grid: QuantParams) -> Array:
    """Torch multiplies by the reciprocal of the step: a tie, or what is one but for rounding, may fall otherwise."""
    fraction = np.abs(values / step_array(grid, values.ndim)) % 1
    return np.asarray(np.abs(fraction - 0.5) > TORCH_EPS * 256)


@pytest.mark.parametrize("kind", ["normal", "small", "large", "positive", "negative"])
@pytest.mark.parametrize("definition", ["own", "torch"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_bit_for_bit(kind: str, definition: Any, symmetric: bool) -> None:
    values = sample(kind)
    given = torch.from_numpy(values)
    for weight in (True, False):
        axis = 0 if weight else None
        scheme = Scheme(symmetric=symmetric, weight=weight, definition=definition)
        grid = grid_of(*limits_of(values, axis), scheme, axis)
        step = torch.from_numpy(step_array(grid, 1).copy()).double()
        zero = torch.from_numpy(np.broadcast_to(zero_point_array(grid, 1), tuple(step.shape)).copy()).long()
        dtype = torch.qint8 if grid.low < 0 else torch.quint8
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if axis == 0:
                quantized = torch.quantize_per_channel(given, step, zero, 0, dtype)
            else:
                quantized = torch.quantize_per_tensor(given, step.item(), int(zero.item()), dtype)
        clear = clear_of_ties(values, grid)
        assert clear.mean() > 0.98
        ours = to_integers(values, grid)
        theirs = np.clip(quantized.int_repr().numpy(), grid.low, grid.high)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours[clear], theirs[clear])
        inside = clear & (theirs >= grid.low) & (quantized.int_repr().numpy() == theirs)
        np.testing.assert_array_equal(to_reals(ours, grid)[inside], quantized.dequantize().numpy()[inside])


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantization_bit_for_bit(symmetric: bool) -> None:
    values = sample("normal")
    for bits in (8, 4, 2):
        scheme = Scheme(bits=bits, symmetric=symmetric, weight=True)
        grid = grid_of(*limits_of(values, 0), scheme, 0)
        zero = torch.from_numpy(np.broadcast_to(zero_point_array(grid, 1), 16).copy()).int()
        theirs = torch.fake_quantize_per_channel_affine(
            torch.from_numpy(values), torch.tensor(grid.step), zero, 0, grid.low, grid.high
        ).numpy()
        clear = clear_of_ties(values, grid)
        np.testing.assert_array_equal(to_reals(to_integers(values, grid), grid)[clear], theirs[clear])


def test_halves_with_an_odd_zero_point() -> None:
    """Torch's fake quantization rounds before it adds the zero point, as ours; its quantization after."""
    values = np.array([0.5, 1.5, 2.5, 3.5], np.float32)
    grid = QuantParams(step=(1.0,), zero_point=(1,), low=0, high=255)
    ours = to_integers(values, grid)
    fake = torch.fake_quantize_per_tensor_affine(torch.from_numpy(values), 1.0, 1, 0, 255)
    assert to_reals(ours, grid).tolist() == fake.tolist() == [0.0, 2.0, 2.0, 4.0]


BATCHES = [(RNG.standard_normal((4, 3, 8, 8)) * scale + 0.3).astype(np.float32) for scale in (1.0, 2.0, 0.5)]


@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_is_torchs(symmetric: bool) -> None:
    scheme = Scheme(symmetric=symmetric, definition="torch")
    grid = grid_of(*observed("minmax", BATCHES).limits(scheme), scheme)
    step, zero = qparams("MinMaxObserver", BATCHES, scheme)
    assert grid.step == tuple(step.tolist())
    assert grid.zero_point == tuple(zero.tolist())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rate", [0.9, 0.99, 0.5])
def test_moving_average_is_torchs(symmetric: bool, rate: float) -> None:
    """Torch averages in float32."""
    scheme = Scheme(symmetric=symmetric, definition="torch")
    grid = grid_of(*observed("moving_average", BATCHES, rate=rate).limits(scheme), scheme)
    step, zero = qparams("MovingAverageMinMaxObserver", BATCHES, scheme, averaging_constant=1 - rate)
    np.testing.assert_allclose(grid.step, step, rtol=tolerance("statistics").value)
    assert grid.zero_point == tuple(zero.tolist())


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "shifted"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_against_torchs_histogram_observer(kind: str, symmetric: bool) -> None:
    """Torch narrows the range step by step by an error that it estimates without clipping: not the same range, and
    no smaller an error."""
    rng = np.random.default_rng(4)
    normal = rng.standard_normal((32, 8, 16, 16))
    values = {
        **{"normal": normal, "laplace": rng.laplace(size=normal.shape)},
        **{"relu": np.maximum(normal, 0), "shifted": normal + 1},
    }[kind].astype(np.float32)
    scheme = Scheme(symmetric=symmetric, definition="torch")
    grid = grid_of(*observed("mse", [values]).limits(scheme), scheme)
    step, zero = qparams("HistogramObserver", [values], scheme)
    theirs = grid.model_copy(update={"step": tuple(step.tolist()), "zero_point": tuple(zero.tolist())})
    errors = [np.mean((to_reals(to_integers(values, g), g).astype(np.float64) - values) ** 2) for g in (grid, theirs)]
    assert errors[0] <= errors[1] * (1 + tolerance("range_search").value)
    assert abs(grid.step[0] / theirs.step[0] - 1) < tolerance("calibrated_range").value
