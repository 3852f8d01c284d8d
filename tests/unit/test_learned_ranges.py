"""Learned ranges: values and gradients against the papers' formulas, on either backend."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimbridge.decisions import QuantParams
from slimbridge.parity import relative, tolerance
from slimbridge.plan.registries import Scheme
from slimbridge.ports import Array, Backend, Device
from slimbridge.quantize.grid import grid_of, to_integers, to_reals
from slimbridge.quantize.learned import LSQ, PACT, LSQPlus, lsq_step
from tests.quantizing import run

RNG = np.random.default_rng(7)
SHAPE = (3, 4, 5)


def off_the_limits(shape: tuple[int, ...], steps: Array, low: int, high: int, offset: float = 0.0) -> Array:
    """Values inside and outside of a grid, none within half a step beyond a limit, where papers and code differ."""
    v = RNG.uniform(low * 1.7 - 3, high * 1.7 + 3, shape)
    v = np.where((v < low) & (v > low - 0.6), low - 0.8, v)
    v = np.where((v > high) & (v < high + 0.6), high + 0.8, v)
    return np.asarray(v * steps + offset)


# The papers, in float64. With `rounding` given (what rounding adds) they are smooth: the straight-through estimator
# is by definition the derivative of that function, so that differences of it are the gradients.

Paper = Callable[..., Array]


def lsq(x: Array, step: Array, low: int, high: int, rounding: Array | None = None) -> Array:
    """Esser et al. 2020, equations 1 and 2."""
    clipped = np.clip(x / step, low, high)
    return np.asarray((np.rint(clipped) if rounding is None else clipped + rounding) * step)


def lsq_plus(x: Array, step: Array, offset: Array, low: int, high: int, rounding: Array | None = None) -> Array:
    """Bhalgat et al. 2020, section 3.1."""
    return np.asarray(lsq(x - offset, step, low, high, rounding) + offset)


def pact(x: Array, alpha: Array, low: int, high: int) -> Array:
    """Choi et al. 2018, equation 1, or clipped on both sides; the rounding adds nothing to the gradient."""
    return np.asarray(0.5 * (np.abs(x) - np.abs(x - alpha) + alpha) if low == 0 else np.clip(x, -alpha, alpha))


def difference(function: Callable[[Array], Array], at: Array, slope: Array) -> Array:
    """Central differences of sum(slope * function) in each entry."""
    at = np.asarray(at, np.float64)
    found = np.zeros(at.size)
    for i in range(at.size):
        size = 1e-6 * max(1.0, abs(at.flat[i]))
        ends = []
        for sign in (1, -1):
            moved = at.copy()
            moved.flat[i] += sign * size
            ends.append(float((function(moved) * slope).sum()))
        found[i] = (ends[0] - ends[1]) / (2 * size)
    return found.reshape(at.shape)


@pytest.mark.parametrize(("low", "high"), [(0, 3), (-4, 3), (-127, 127)])
def test_lsq_of_an_activation(backend: Backend, device: Device, low: int, high: int) -> None:
    step = np.asarray(np.float32(0.37), np.float64)
    x, slope = off_the_limits(SHAPE, step, low, high), RNG.standard_normal(SHAPE)
    ran = run(backend, device, LSQ(step, low, high), x, slope=slope)
    assert np.array_equal(ran.output, lsq(x, step, low, high))
    v = x / step
    inside = (v > low) & (v < high)
    equation_3 = np.where(inside, np.rint(v) - v, np.clip(v, low, high))
    scale = 1 / sqrt(4 * 5 * high)  # features of one sample
    allowed = tolerance("gradient_float64").value
    assert relative(ran.gradients["step"], np.asarray((equation_3 * slope).sum() * scale)) <= allowed
    assert relative(ran.gradients["x"], np.where(inside, slope, 0)) <= allowed
    rounding = np.rint(np.clip(v, low, high)) - np.clip(v, low, high)
    smooth = difference(lambda s: lsq(x, s, low, high, rounding), step, slope)
    assert relative(ran.gradients["step"], smooth * scale) <= tolerance("finite_difference").value
    smooth = difference(lambda y: lsq(y, step, low, high, rounding), x, slope)
    assert relative(ran.gradients["x"], smooth) <= tolerance("finite_difference").value


@pytest.mark.parametrize("axis", [0, 1])
def test_lsq_of_a_weight_per_channel(backend: Backend, device: Device, axis: int) -> None:
    low, high, channels = -7, 7, SHAPE[axis]
    shape = tuple(-1 if i == axis else 1 for i in range(3))
    step = np.asarray(RNG.uniform(0.1, 0.5, channels).astype(np.float32), np.float64)
    x, slope = off_the_limits(SHAPE, step.reshape(shape), low, high), RNG.standard_normal(SHAPE)
    ran = run(backend, device, LSQ(step, low, high, axis, activation=False), x, slope=slope)
    assert np.array_equal(ran.output, lsq(x, step.reshape(shape), low, high))
    clipped = np.clip(x / step.reshape(shape), low, high)
    rounding = np.rint(clipped) - clipped
    smooth = difference(lambda s: lsq(x, s.reshape(shape), low, high, rounding), step, slope)
    scale = 1 / sqrt(x.size // channels * high)  # weights that share a step
    assert relative(ran.gradients["step"], smooth * scale) <= tolerance("finite_difference").value


def test_lsq_in_groups(backend: Backend, device: Device) -> None:
    weight = RNG.standard_normal((3, 2, 4))
    step = np.asarray(RNG.uniform(0.1, 0.5, 6).astype(np.float32), np.float64)
    quant = LSQ(step, -7, 7, 0, 4, activation=False)
    ran = run(backend, device, quant, weight)
    assert np.array_equal(ran.output, lsq(weight.reshape(6, 4), step[:, None], -7, 7).reshape(weight.shape))
    assert ran.gradients["step"].shape == (6,)
    assert quant.grid({"step": step}).group == 4


def test_lsq_beyond_a_limit_by_less_than_half_a_step(backend: Backend, device: Device) -> None:
    """Rounding brings it back to the limit, so that it counts as inside; the paper's clip comes first."""
    x = np.array([[3.25, 3.75, -4.25, -4.75]])
    ran = run(backend, device, LSQ(np.ones(()), -4, 3), x)
    assert np.array_equal(ran.output, [[3, 3, -4, -4]])
    assert np.array_equal(ran.gradients["x"], [[1, 0, 1, 0]])
    wanted = (-0.25 + 3 + 0.25 - 4) / sqrt(4 * 3)
    assert relative(ran.gradients["step"], np.asarray(wanted)) <= tolerance("gradient_float64").value


def test_lsq_keeps_a_zero_point(backend: Backend, device: Device) -> None:
    grid = QuantParams(step=(0.25,), zero_point=(3,), low=0, high=15)
    quant, x = LSQ.of(grid, "fc"), RNG.uniform(-2, 5, SHAPE).astype(np.float32)
    ran = run(backend, device, quant, x, dtype="float32")
    assert np.array_equal(ran.output, to_reals(to_integers(x, grid), grid))
    assert quant.grid(quant.parameters) == grid


def test_the_papers_first_step() -> None:
    weight = RNG.standard_normal((4, 3, 2))
    mean = np.abs(weight).mean(axis=(1, 2))
    quant = LSQ.of_weight(weight, "conv", bits=4)
    assert np.array_equal(quant.parameters["step"], (2 * mean / sqrt(7)).astype(np.float32))
    assert (quant.low, quant.high, quant.activation) == (-7, 7, False)
    assert lsq_step(np.zeros(2), 7).tolist() == [1, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_that_turned_negative_counts_by_its_magnitude(backend: Backend, device: Device, sign: int) -> None:
    x = RNG.standard_normal(SHAPE)
    quant, step = LSQ(np.asarray(0.25), -7, 7), np.asarray(0.25)
    there = run(backend, device, quant, x, {"step": step})
    ran = run(backend, device, quant, x, {"step": sign * step})
    assert np.array_equal(ran.output, there.output)
    assert ran.gradients["step"] == sign * there.gradients["step"]
    assert quant.grid({"step": sign * step}).step == (0.25,)
    assert np.isfinite(run(backend, device, quant, x, {"step": np.zeros(())}).output).all()


@pytest.mark.parametrize(("low", "high"), [(0, 15), (-8, 7), (0, 255)])
@pytest.mark.parametrize("offset", [-1.75, 0.0, 0.6])
def test_lsq_plus(backend: Backend, device: Device, low: int, high: int, offset: float) -> None:
    step = np.asarray(np.float32(0.21), np.float64)
    beta = np.asarray(np.float32(offset), np.float64)
    x, slope = off_the_limits(SHAPE, step, low, high, offset), RNG.standard_normal(SHAPE)
    ran = run(backend, device, LSQPlus(float(step), float(beta), low, high), x, slope=slope)
    assert np.array_equal(ran.output, lsq_plus(x, step, beta, low, high))
    clipped = np.clip((x - beta) / step, low, high)
    rounding = np.rint(clipped) - clipped
    scale, allowed = 1 / sqrt(4 * 5 * high), tolerance("finite_difference").value
    smooth = difference(lambda s: lsq_plus(x, s, beta, low, high, rounding), step, slope)
    assert relative(ran.gradients["step"], smooth * scale) <= allowed
    smooth = difference(lambda b: lsq_plus(x, step, b, low, high, rounding), beta, slope)
    assert relative(ran.gradients["offset"], smooth * scale) <= allowed
    smooth = difference(lambda y: lsq_plus(y, step, beta, low, high, rounding), x, slope)
    assert relative(ran.gradients["x"], smooth) <= allowed


@given(smallest=st.floats(-100, 0), width=st.floats(0.1, 100), bits=st.integers(2, 8), start=st.sampled_from([0, -1]))
def test_the_grid_of_lsq_plus_is_near_to_it(smallest: float, width: float, bits: int, start: int) -> None:
    low = start * 2 ** (bits - 1)
    high = low + 2**bits - 1
    quant = LSQPlus.of_range(smallest, max(smallest + width, 0), low, high, "relu")
    grid = quant.grid(quant.parameters)
    step, offset = (float(quant.parameters[name]) for name in ("step", "offset"))
    assert grid.step == (step,)
    assert abs(-step * grid.zero_point[0] - offset) <= step * 0.5 * (1 + tolerance("operation").value)


def test_a_range_of_lsq_plus_that_leaves_0_out_is_widened() -> None:
    quant = LSQPlus.of_range(2, 5, 0, 255, "gelu")
    assert quant.grid(quant.parameters) == grid_of(0, 5, Scheme(symmetric=False))
    quant = LSQPlus.of_range(-5, -2, 0, 255, "gelu")
    assert quant.grid(quant.parameters) == grid_of(-5, 0, Scheme(symmetric=False))
    assert LSQPlus.of_range(0, 0, 0, 255, "dead").step == 1


@pytest.mark.parametrize("signed", [False, True])
def test_pact(backend: Backend, device: Device, signed: bool) -> None:
    alpha = np.asarray(np.float32(1.3), np.float64)
    x, slope = RNG.uniform(-3, 3, SHAPE), RNG.standard_normal(SHAPE)
    quant = PACT(float(alpha), 4, signed)
    ran = run(backend, device, quant, x, slope=slope)
    high = 7 if signed else 15
    low = -high if signed else 0
    step = alpha / high
    assert np.array_equal(ran.output, np.rint(np.clip(x, low and -alpha, alpha) / step) * step)
    exact = ((x >= alpha) * slope).sum() - ((x <= -alpha) * slope).sum() * signed
    assert relative(ran.gradients["alpha"], np.asarray(exact)) <= tolerance("gradient_float64").value
    smooth = difference(lambda a: pact(x, a, low, high), alpha, slope)
    assert relative(ran.gradients["alpha"], smooth) <= tolerance("finite_difference").value
    smooth = difference(lambda y: pact(y, alpha, low, high), x, slope)
    assert relative(ran.gradients["x"], smooth) <= tolerance("finite_difference").value
    assert quant.grid(quant.parameters) == QuantParams(
        step=(float(np.float32(1.3) / np.float32(high)),), low=low, high=high
    )


@pytest.mark.parametrize("signed", [False, True])
def test_pact_lets_what_is_no_number_through(backend: Backend, device: Device, signed: bool) -> None:
    quant, model = PACT(1.0, signed=signed), backend.place(backend.nn.Linear(1, 1), device)
    x, alpha = backend.tensor(model, np.array([np.nan, 3.0])), backend.tensor(model, quant.parameters["alpha"])
    output, _ = quant(backend.ops, x, {"alpha": alpha}, True)
    assert np.isnan(backend.ops.numpy(output)).tolist() == [True, False]
