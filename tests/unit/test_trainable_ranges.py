"""Ranges that move, and what holds for all that are trained, on either backend and in a model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimbridge.decisions import Fold, Site
from slimbridge.errors import ModelError
from slimbridge.parity import relative, tolerance
from slimbridge.plan.registries import Scheme
from slimbridge.ports import Array, Backend, Device, OptimizerSettings
from slimbridge.quantize.fake import Static
from slimbridge.quantize.fold import fold_weights
from slimbridge.quantize.grid import grid_of, limits_of, to_integers, to_reals
from slimbridge.quantize.learned import LSQ, PACT, LSQPlus
from slimbridge.quantize.ranges import AbsMax, Folded, MovingAverage, Trainable
from tests.quantizing import run

RNG = np.random.default_rng(7)
SHAPE = (3, 4, 5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_moving_average_is_that_of_torch(backend: Backend, device: Device, symmetric: bool) -> None:
    """Whose observer averages the extremes themselves, so that a symmetric one is compared on positive tensors."""
    quant = MovingAverage(0, 255, symmetric, rate=0.75)
    theirs = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.25)
    values: dict[str, Array] = dict(quant.buffers)
    for _ in range(4):
        x = RNG.standard_normal(SHAPE).astype(np.float32)
        x = np.abs(x) if symmetric else x
        theirs(torch.from_numpy(x))
        ran = run(backend, device, quant, x, values, dtype="float32")
        values = {**values, **ran.changed}
    allowed = tolerance("operation").value
    assert relative(values["threshold" if symmetric else "max"], theirs.max_val.numpy()) <= allowed
    assert symmetric or relative(values["min"], theirs.min_val.numpy()) <= allowed
    assert values["count"] == 4


@pytest.mark.parametrize("initial", [None, (-2.0, 4.0)])
@pytest.mark.parametrize(("low", "high", "symmetric"), [(-128, 127, True), (0, 255, True), (0, 255, False)])
def test_it_computes_with_the_grid_it_gives(
    backend: Backend, device: Device, initial: Any, low: int, high: int, symmetric: bool
) -> None:
    quant = MovingAverage(low, high, symmetric, 0.5, initial)
    x = RNG.standard_normal(SHAPE).astype(np.float32) * 3
    ran = run(backend, device, quant, x, dtype="float32")
    if initial is None:
        top = np.abs(x).max()
        assert np.array_equal(ran.changed["threshold" if symmetric else "max"], top if symmetric else x.max())
    values = {**quant.buffers, **ran.changed}
    grid = quant.grid(values)
    assert np.array_equal(ran.output, to_reals(to_integers(x, grid), grid))
    later = run(backend, device, quant, x * 2, values, training=False, dtype="float32")
    assert not later.changed
    assert np.array_equal(later.output, to_reals(to_integers(x * 2, grid), grid))


def test_before_the_first_batch_the_tensors_own_range_counts(backend: Backend, device: Device) -> None:
    quant = MovingAverage(-128, 127, True)
    x = RNG.standard_normal(SHAPE).astype(np.float32)
    ran = run(backend, device, quant, x, training=False, dtype="float32")
    grid = grid_of(x.min(), x.max(), Scheme())
    assert np.array_equal(ran.output, to_reals(to_integers(x, grid), grid))
    assert not ran.changed
    with pytest.raises(ModelError, match="neither calibration"):
        quant.grid(quant.buffers)


@pytest.mark.parametrize(
    ("axis", "group", "bits"), [(None, None, 8), (0, None, 8), (1, None, 4), (0, 5, 8), (0, 20, 2)]
)
def test_the_step_of_a_weight_is_its_grids(backend: Backend, device: Device, axis: Any, group: Any, bits: int) -> None:
    weight = RNG.standard_normal(SHAPE).astype(np.float32)
    weight[1] = 0
    quant = AbsMax(bits, axis, group)
    grid = grid_of(*limits_of(weight, axis, group), Scheme(bits=bits, weight=True), axis, group)
    assert quant.grid({"weight": weight}) == grid
    slope = RNG.standard_normal(SHAPE)
    ran = run(backend, device, quant, weight, slope=slope, dtype="float32")
    assert np.array_equal(ran.output, to_reals(to_integers(weight, grid), grid))
    assert np.array_equal(ran.gradients["x"], slope.astype(np.float32))


@given(
    threshold=st.floats(0, float(np.finfo(np.float32).max), width=32),
    bits=st.integers(2, 8),
)
def test_a_float32_step_is_the_float64_step_rounded(threshold: float, bits: int) -> None:
    weight = np.array([[threshold, -threshold / 2]], np.float32)
    assert AbsMax(bits).grid({"weight": weight}) == grid_of(*limits_of(weight, 0), Scheme(bits=bits, weight=True), 0)


FOLD = Fold(weight="x", scale="scale", shift="b", mean="m", variance="variance", eps=1e-3)


@pytest.mark.parametrize("inner", ["absmax", "lsq"])
def test_a_folded_weight(backend: Backend, device: Device, inner: str) -> None:
    weight = RNG.standard_normal(SHAPE).astype(np.float32)
    norm = {"scale": np.array([1.5, -0.25, 2], np.float32), "variance": np.array([0.5, 3, 1e-4], np.float32)}
    rest = {"b": np.zeros(3, np.float32), "m": np.zeros(3, np.float32)}
    folded = fold_weights({"x": weight, **norm, **rest}, (FOLD,))["x"]
    own: Trainable = AbsMax(8) if inner == "absmax" else LSQ.of_weight(folded, "conv")
    quant = Folded(own, FOLD)
    assert quant.reads == {"scale": "scale", "variance": "variance"}
    slope = RNG.standard_normal(SHAPE)
    ran = run(backend, device, quant, weight, norm, slope)
    factor = (norm["scale"] / np.sqrt(norm["variance"] + np.float64(1e-3)))[:, None, None]
    grid = quant.grid({**quant.parameters, "weight": folded})
    assert relative(ran.output * factor, to_reals(to_integers(folded, grid), grid)) <= tolerance("operation").value
    assert not ran.gradients["scale"].any()
    assert not ran.gradients["variance"].any()
    if inner == "absmax":
        assert relative(ran.gradients["x"], slope) <= tolerance("operation_float64").value
    else:
        assert np.isfinite(ran.gradients["step"]).all()


def test_a_folded_channel_whose_scale_is_0(backend: Backend, device: Device) -> None:
    weight, norm = RNG.standard_normal((2, 3)), {"scale": np.array([0.0, 1e-45]), "variance": np.ones(2)}
    ran = run(backend, device, Folded(AbsMax(8), FOLD), weight, norm, dtype="float32")
    plain = run(backend, device, AbsMax(8), weight, dtype="float32")
    assert np.array_equal(ran.output, plain.output)


# All of them

WEIGHT = RNG.standard_normal(SHAPE)
ALL: dict[str, Callable[[], Trainable]] = {
    "moving average": lambda: MovingAverage(0, 255, False, 0.5, (-1.0, 2.0)),
    "moving average of magnitudes": lambda: MovingAverage(-128, 127, True, 0.5, (-1.0, 2.0)),
    "absmax": lambda: AbsMax(8),
    "lsq": lambda: LSQ(np.asarray(0.02), -128, 127),
    "lsq of a weight": lambda: LSQ.of_weight(WEIGHT, "conv", 4),
    "lsq+": lambda: LSQPlus.of_range(-1.0, 2.0, 0, 255, "fc"),
    "pact": lambda: PACT(1.5),
    "signed pact": lambda: PACT(1.5, signed=True),
}


@pytest.mark.parametrize("name", list(ALL))
def test_frozen_ranges_stay(backend: Backend, device: Device, name: str) -> None:
    quant = ALL[name]()
    x = WEIGHT * 4
    moving = run(backend, device, quant, x)
    assert all(moving.gradients[own].any() for own in quant.parameters)
    assert set(moving.changed) == set(quant.buffers)
    quant.frozen = True
    frozen = run(backend, device, quant, x)
    assert not any(frozen.gradients[own].any() for own in quant.parameters)
    assert not frozen.changed
    folded = Folded(quant, FOLD)
    folded.frozen = False
    assert not quant.frozen


@pytest.mark.parametrize("name", list(ALL))
def test_the_grid_it_ends_with_gives_what_it_gave(backend: Backend, device: Device, name: str) -> None:
    """But for LSQ+, whose offset becomes a whole number of steps."""
    quant, x = ALL[name](), WEIGHT.astype(np.float32) * 2
    found = run(backend, device, quant, x, training=False, dtype="float32").output
    grid = quant.grid({**quant.parameters, **quant.buffers, "weight": x})
    static = run(backend, device, Static(grid, name), x, training=False, dtype="float32").output
    if name == "lsq+":
        assert np.abs(found - static).max() <= grid.step[0] * 1.5
    else:
        assert np.array_equal(found, static)


@pytest.mark.parametrize("name", list(ALL))
def test_the_backends_agree(torch_backend: Backend, paddle_backend: Backend, name: str) -> None:
    x, slope = WEIGHT.astype(np.float32) * 2, RNG.standard_normal(SHAPE)
    one, other = (
        run(backend, "cpu", ALL[name](), x, slope=slope, dtype="float32") for backend in (torch_backend, paddle_backend)
    )
    assert np.array_equal(one.output, other.output)
    assert one.changed.keys() == other.changed.keys()
    assert all(np.array_equal(one.changed[key], other.changed[key]) for key in one.changed)
    for key, gradient in one.gradients.items():
        assert relative(other.gradients[key], gradient) <= tolerance("gradient").value, key


@pytest.mark.parametrize("name", list(ALL))
def test_a_copy_is_independent(backend: Backend, device: Device, name: str) -> None:
    quant = ALL[name]()
    before = run(backend, device, quant, WEIGHT)
    copied = deepcopy(quant)
    copied.frozen = True
    for array in (*copied.parameters.values(), *copied.buffers.values()):
        array += 1
    assert not quant.frozen
    assert np.array_equal(run(backend, device, quant, WEIGHT).output, before.output)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "rate": (lambda: MovingAverage(0, 255, True, rate=1.0, where="fc"), "fc: rate must be 0 to below 1, found 1"),
    "integers": (lambda: MovingAverage(3, 3, False, where="fc"), "fc: integers 3..3"),
    "one side": (lambda: MovingAverage(-5, 0, True, where="fc"), "fc: integers -5..0"),
    "range": (lambda: MovingAverage(0, 255, True, initial=(0, np.inf), where="fc"), "fc: the calibrated range is"),
    "bits": (lambda: AbsMax(9, where="conv"), "conv: bits must be 2..8, found 9"),
    "group": (lambda: AbsMax(8, 1, 4, where="conv"), "conv: groups"),
    "step": (lambda: LSQ(np.zeros(()), 0, 255, where="fc"), "fc: each step must be positive"),
    "steps": (lambda: LSQ(np.ones(2), 0, 255, 0, zero_point=(1, 2, 3), where="fc"), "fc: 3 zero points for 2 steps"),
    "step of lsq+": (lambda: LSQPlus(-1.0, 0.0, where="fc"), "fc: each step must be positive"),
    "offset": (lambda: LSQPlus(1.0, np.nan, where="fc"), "fc: the offset must be finite"),
    "alpha": (lambda: PACT(0.0, where="fc"), "fc: alpha must be positive"),
    "bits of pact": (lambda: PACT(1.0, 1, where="fc"), "fc: bits must be 2..8, found 1"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_is_not_usable_is_refused(name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(ModelError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_steps_that_do_not_fit_the_tensor(backend: Backend, device: Device) -> None:
    with pytest.raises(ModelError, match="fc: 2 steps for a tensor of shape"):
        run(backend, device, LSQ(np.ones(2), 0, 255, 1, where="fc"), WEIGHT)
    with pytest.raises(ModelError, match="conv: rows of 20 entries cannot be cut into groups of 3"):
        run(backend, device, AbsMax(8, 0, 3, where="conv"), WEIGHT)


# In a model


def small(backend: Backend, device: Device) -> Any:
    """Convolution, BatchNorm, linear layer, equal weights on each backend, float64."""
    nn = backend.nn

    class Small(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Linear(12, 4)

        def forward(self, x: Any) -> Any:
            return self.fc(nn.flatten(self.norm(self.conv(x)), 1))

    model = backend.place(Small(), device, "float64")
    rng = np.random.default_rng(3)
    start = {name: rng.standard_normal(array.shape) * 0.5 for name, array in sorted(backend.read(model).items())}
    return backend.write(model, {**start, "norm.running_var": np.array([0.5, 1, 2])})


def trained(backend: Backend, device: Device, quants: Any, frozen: bool = False) -> dict[str, Array]:
    """The model's values after three steps with momentum and weight decay, then one more with frozen ranges."""
    model = backend.insert_quant(small(backend, device), quants)
    optimizer = backend.make_optimizer(model, OptimizerSettings(momentum=0.9, weight_decay=0.01))
    optimizer.set_lr(0.05)
    rng = np.random.default_rng(4)
    for number in range(4 if frozen else 3):
        for quant in quants.values():
            quant.frozen = number == 3
        backend.train_step(
            model,
            optimizer,
            [rng.standard_normal((5, 2, 4, 4))],
            lambda result: {"loss": backend.ops.mean(result.output * result.output)},
        )
    return backend.read(model)


NORM = Fold(
    weight="conv.weight",
    scale="norm.weight",
    shift="norm.bias",
    mean="norm.running_mean",
    variance="norm.running_var",
    eps=1e-5,
)
SETS: dict[str, Callable[[], dict[Site, Trainable]]] = {
    "ranges": lambda: {
        Site("conv"): MovingAverage(-128, 127, True, 0.9, (-2.0, 2.0)),
        Site("conv", "weight"): Folded(AbsMax(8), NORM),
        Site("fc"): MovingAverage(0, 255, False, 0.9),
        Site("fc", "weight"): AbsMax(4, None),
    },
    "lsq": lambda: {
        Site("conv"): LSQ(np.asarray(0.5), -8, 7),
        Site("conv", "weight"): Folded(LSQ(np.full(3, 0.1), -7, 7, 0, activation=False), NORM),
        Site("fc"): LSQPlus.of_range(-3.0, 3.0, 0, 15, "fc"),
        Site("fc", "weight"): LSQ(np.asarray(0.1), -7, 7, activation=False),
    },
    "pact": lambda: {Site("conv"): PACT(1.0, 4, True), Site("fc"): PACT(2.0, 4, True)},
}


@pytest.mark.parametrize("name", list(SETS))
def test_training_is_the_same_on_both(torch_backend: Backend, paddle_backend: Backend, name: str) -> None:
    one, other = (trained(backend, "cpu", SETS[name]()) for backend in (torch_backend, paddle_backend))
    assert one.keys() == other.keys()
    for key, array in one.items():
        assert relative(other[key], array) <= tolerance("training_float64").value, key


@pytest.mark.parametrize("name", list(SETS))
def test_frozen_ranges_stay_in_training(backend: Backend, device: Device, name: str) -> None:
    """Neither momentum nor weight decay moves them."""
    quants = SETS[name]()
    start = backend.read(backend.insert_quant(small(backend, device), quants))
    before, after = (trained(backend, device, SETS[name](), frozen) for frozen in (False, True))
    own = [f"{site.path}.{site.held(kept)}" for site, q in quants.items() for kept in (*q.parameters, *q.buffers)]
    assert own
    for key in own:
        assert not np.array_equal(start[key], before[key]), key
        assert np.array_equal(before[key], after[key]), key
    assert not np.array_equal(before["conv.weight"], after["conv.weight"])
