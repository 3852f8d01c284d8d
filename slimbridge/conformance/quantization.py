"""Cases on quantization: the operation and its gradients, fake quantization in a model, statistics that are held."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from slimbridge.conformance.models import image, random, topology
from slimbridge.conformance.suite import Bench, case, refuses, require, within
from slimbridge.decisions import Site
from slimbridge.parity.measure import differing, relative
from slimbridge.ports import Array, Model, Ops, OptimizerSettings, Tensor, tensors_in
from slimbridge.zoo.parts import Part, make

_LOW, _HIGH = -20, 15


class Join(Part):
    """A layer of two inputs and, nested, two outputs."""

    def forward(self, a: Any, b: Any) -> Any:
        """The sum, and in a list the difference."""
        return a + b, [a - b]


class Twice(Part):
    """A linear layer that runs twice, and a layer of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = self.nn.Linear(3, 3)
        self.join: Any = make(self.nn, Join)

    def forward(self, x: Any, y: Any) -> Any:
        """(N, 3) and (N, 3) -> two of the same."""
        return self.join(self.fc(self.fc(x)), y)


@dataclass(frozen=True)
class Scaling:
    """No rounding, so that results are exact: x * factor + other; counts its training passes."""

    factor: float = 2.0
    reads: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> Mapping[str, Array]:
        """The factor, a scalar."""
        return {"factor": np.array(self.factor)}

    @property
    def buffers(self) -> Mapping[str, Array]:
        """A count, and a vector that never changes."""
        return {"count": np.array(0.0), "still": np.arange(3.0)}

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The scaled tensor."""
        x = x * state["factor"]
        for name in self.reads:
            x = x + state[name]
        return x, {"count": state["count"] + 1.0} if training else {}


def twice(bench: Bench, dtype: Any = "float32") -> Model:
    """`Twice` with the identity as weight and no bias: it gives x + y and x - y, exactly."""
    model = bench.backend.place(make(bench.backend.nn, Twice), bench.device, dtype)
    return bench.backend.write(model, {"fc.weight": np.eye(3, dtype=dtype), "fc.bias": np.zeros(3, dtype)})


def outputs(bench: Bench, model: Model, *inputs: Array) -> list[Array]:
    """All outputs of a forward pass."""
    return [bench.backend.ops.numpy(item) for item in tensors_in(bench.backend.forward(model, inputs).output)]


def rounded(value: Array, away: bool) -> Array:
    """To whole numbers; halves to even, or away from zero."""
    whole = np.trunc(value)
    up = whole + np.where(np.abs(value - whole) >= 0.5, np.sign(value), 0).astype(value.dtype)
    return up if away else np.rint(value)


def _grids(dtype: Any) -> list[tuple[int | None, Array, Array]]:
    """Axis, steps and zero points for a tensor of shape (4, 5, 6); the steps are no powers of two."""
    return [
        (None, np.array(0.07, dtype), np.array(0, dtype)),
        (None, np.array(0.3, dtype), np.array(3, dtype)),
        (0, np.array([0.1, 0.3, 0.07, 1.1], dtype), np.array([0, -4, 2, 7], dtype)),
        (1, np.array([0.1, 0.3, 0.07, 1.1, 3e-3], dtype), np.zeros(5, dtype)),
    ]


def _along(values: Array, axis: int | None) -> Array:
    return values if axis is None else values.reshape([-1 if i == axis else 1 for i in range(3)])


@case("quantization: fake_quant equals its formula to the last bit")
def formula(bench: Bench) -> None:
    """Ties, clipping, zero points, both roundings, one step and one for each channel, both floating types."""
    dtypes: tuple[Any, ...] = (np.float32, np.float64)
    for dtype in dtypes:
        model = bench.backend.place(bench.backend.nn.Linear(2, 2), bench.device, np.dtype(dtype).name)  # type: ignore[arg-type]
        for axis, step, zero in _grids(dtype):
            steps, zeros = _along(step, axis), _along(zero, axis)
            x: Array = random(4, 5, 6).astype(dtype) * 2
            x[:, :, 3:] = (np.arange(-30, 30).reshape(4, 5, 3).astype(dtype) + dtype(0.5)) * steps  # at or next to ties
            for away in (False, True):
                whole: Array = np.clip(rounded(x / steps, away) + zeros, dtype(_LOW), dtype(_HIGH)) - zeros
                native = [bench.backend.tensor(model, array) for array in (x, step, zero)]
                found = bench.backend.ops.fake_quant(
                    native[0], native[1], native[2] if zero.any() else None, _LOW, _HIGH, axis, away
                )
                wrong = int(np.count_nonzero(bench.backend.ops.numpy(found) != whole * steps))
                what = f"axis {axis}, {'away' if away else 'even'}, {np.dtype(dtype).name}: {wrong} of {x.size} entries"
                within(what, float(wrong), "fake_quant")


@case("quantization: fake_quant has the gradients of STE and LSQ")
def gradients(bench: Bench) -> None:
    """Of the tensor 1 inside and 0 outside, of the step as Esser et al. 2020, equation 3."""
    for axis, size in ((0, 6), (None, 1)):
        model = bench.backend.place(bench.backend.nn.Linear(40, size), bench.device, "float64")
        x = random(size, 40, seed=1).astype(np.float64) * 3
        step, zero = np.linspace(0.07, 0.31, size), np.full(size, 2.0)
        model = bench.backend.write(model, {"weight": x, "bias": step})
        slope = random(size, 40, seed=2).astype(np.float64)
        value = x / step[:, None]
        whole = np.rint(value) + 2
        inside = (whole >= _LOW) & (whole <= _HIGH)
        require(inside.any() and not inside.all(), "the case itself must have entries inside and outside")
        by_step = np.where(inside, np.rint(value) - value, np.clip(whole, _LOW, _HIGH) - 2) * slope
        expected = {"weight": np.where(inside, slope, 0), "bias": by_step.sum(1)}
        for trained in (True, False):
            found = _fake_quant_gradients(bench, model, axis, zero, slope, trained)
            for name in expected if trained else ("weight",):
                within(f"axis {axis}, {name}", relative(found[name], expected[name]), "gradient_float64")
            require(trained or not found["bias"].any(), "a step without gradient got one")


def _fake_quant_gradients(
    bench: Bench, model: Model, axis: int | None, zero: Array, slope: Array, trained: bool
) -> dict[str, Array]:
    """Of sum(slope * fake_quant(weight, step = bias))."""
    ops = bench.backend.ops
    zeros = bench.backend.tensor(model, zero if axis is not None else zero[0])
    slopes = bench.backend.tensor(model, slope)

    def loss(result: Any) -> dict[str, Tensor]:
        step = result.parameters["bias"] if axis is not None else ops.reshape(result.parameters["bias"], ())
        step = step if trained else ops.stop_gradient(step)
        return {"loss": ops.sum(ops.fake_quant(result.parameters["weight"], step, zeros, _LOW, _HIGH, axis) * slopes)}

    return bench.backend.gradients(model, [np.zeros((1, 40))], loss)


@case("quantization: extremes of a tensor and of its channels")
def extremes(bench: Bench) -> None:
    """Shapes () and (channels,), values exact."""
    model = bench.backend.place(bench.backend.nn.Linear(2, 2), bench.device)
    x = random(4, 5, 6) + 0.5
    for axis, others in ((None, (0, 1, 2)), (0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        found = bench.backend.ops.extremes(bench.backend.tensor(model, x), axis)
        low, high = (bench.backend.ops.numpy(item) for item in found)
        require(low.shape == high.shape == x.min(others).shape, f"axis {axis}: shapes {low.shape} and {high.shape}")
        require(np.array_equal(low, x.min(others)), f"axis {axis}: smallest {low.tolist()}")
        require(np.array_equal(high, x.max(others)), f"axis {axis}: largest {high.tolist()}")


@case("quantization: a site is the tensor that its key says")
def sites(bench: Bench) -> None:
    """Inputs, outputs and weights; the second of several; one call of two, also after a pass that failed."""
    x, y = random(4, 3), random(4, 3, seed=1)
    expected: dict[str, tuple[Array, Array]] = {
        "fc": (4 * x + y, 4 * x - y),
        "fc:input#1": (2 * x + y, 2 * x - y),
        "fc:output#0": (2 * x + y, 2 * x - y),
        "fc:output#7": (x + y, x - y),
        "fc:weight": (4 * x + y, 4 * x - y),
        "join:input.1": (x + 2 * y, x - 2 * y),
        "join:output.1": (x + y, 2 * (x - y)),
    }
    backend = bench.backend
    for key, wanted in expected.items():
        model = backend.insert_quant(twice(bench), {Site.parse(key): Scaling()})
        for _ in range(2):
            _require_outputs(key, outputs(bench, model, x, y), wanted)
            with suppress(Exception):  # whatever the framework raises for shapes that do not fit
                backend.forward(model, [x, random(5, 2)])
        _require_outputs(f"{key}, cloned", outputs(bench, backend.clone(model), x, y), wanted)
    model = backend.insert_quant(twice(bench), {Site.parse(key): Scaling() for key in expected})
    _require_outputs("all", outputs(bench, model, x, y), (64 * x + 2 * y, 2 * (64 * x - 2 * y)))


def _require_outputs(what: str, found: list[Array], wanted: tuple[Array, Array]) -> None:
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        require(np.array_equal(one, other), f"{what}: output {index} is not what the scaled tensor gives")


@case("quantization: what is inserted has names, and goes without a trace")
def names(bench: Bench) -> None:
    """Read, written, cloned; replaced by the next insertion; refused whole; unseen by trace and layers."""
    backend = bench.backend
    plain = twice(bench)
    inputs = [random(4, 3), random(4, 3, seed=1)]
    before, graph, listed = backend.read(plain), backend.trace(plain, inputs), backend.layers(plain)
    keys = {"fc": "fc.quant_input", "fc:output#0": "fc.quant_output_0", "join:input.1": "join.quant_input1"}
    keys |= {"fc:weight": "fc.quant_weight", "join:output.1#0": "join.quant_output1_0"}
    model = backend.insert_quant(plain, {Site.parse(key): Scaling() for key in keys})
    added = {f"{stem}_{name}" for stem in keys.values() for name in ("factor", "count", "still")}
    found = backend.read(model)
    require(set(found) - set(before) == added, f"names differ: {sorted((set(found) - set(before)) ^ added)}")
    require(np.array_equal(found["fc.weight"], before["fc.weight"]), "read gives another weight than the layer's own")
    require(found["fc.quant_input_factor"].shape == (), "a scalar's shape changed")
    require(backend.layers(model) == listed, "layers lists what was inserted")
    traced = backend.trace(model, inputs)
    require(dict(traced.parameters) == dict(graph.parameters), "trace lists what was inserted")
    kinds = [[node.kind for node in item.nodes] for item in (graph, traced)]
    require(kinds[0] == kinds[1], "trace sees what was inserted")
    twin = backend.write(backend.clone(model), {"fc.quant_input_factor": np.array(4.0)}, partial=True)
    require(float(backend.read(twin)["fc.quant_input_factor"]) == 4, "a written value does not stay")
    require(float(backend.read(model)["fc.quant_input_factor"]) == 2, "a clone shares what was inserted")
    for key, reads in (("fcc", {}), ("join:weight", {}), ("fc", {"other": "fc.wieght"})):
        quant = Scaling(3.0, reads)
        both = {Site("fc", "output"): quant, Site.parse(key): quant}
        refuses(f"'{key}' reading {reads}", partial(backend.insert_quant, model, both))
    require(differing(backend.read(model), found) == 0, "a refused insertion changed the model")
    model = backend.insert_quant(model, {Site("fc"): Scaling(8.0)})
    require(float(backend.read(model)["fc.quant_input_factor"]) == 8, "a second insertion does not replace the first")
    require(len(backend.read(model)) == len(before) + 3, "a second insertion leaves parts of the first")
    model = backend.insert_quant(model, {})
    require(differing(backend.read(model), before) == 0, "taking all out leaves something")
    _require_outputs("taken out", outputs(bench, model, *inputs), (inputs[0] + inputs[1], inputs[0] - inputs[1]))


@case("quantization: parameters of the model can be read, a clone reads its own")
def reads(bench: Bench) -> None:
    """The value of now, not the one at insertion."""
    backend = bench.backend
    x, y = random(4, 3), random(4, 3, seed=1)
    model = backend.insert_quant(twice(bench), {Site("join", argument=1): Scaling(2.0, {"other": "fc.bias"})})
    twin = backend.clone(model)
    model = backend.write(model, {"fc.bias": np.ones(3, np.float32)}, partial=True)
    once = x + 1 + 1
    _require_outputs("after a write", outputs(bench, model, x, y), (once + (2 * y + 1), once - (2 * y + 1)))
    _require_outputs("the clone", outputs(bench, twin, x, y), (x + 2 * y, x - 2 * y))


@case("quantization: parameters are trained, buffers change in training steps only")
def training(bench: Bench) -> None:
    """Gradients by the chain rule in float64: of the factors, and of the weight behind its fake quantization."""
    backend = bench.backend
    nn = backend.nn
    model = backend.place(nn.Sequential(nn.Linear(3, 3)), bench.device, "float64")
    weight, x, slope = (random(*shape, seed=i).astype(np.float64) for i, shape in enumerate(((3, 3), (5, 3), (5, 3))))
    model = backend.write(model, {"0.weight": weight, "0.bias": np.zeros(3)})
    model = backend.insert_quant(model, {Site("0"): Scaling(2.0), Site("0", "weight"): Scaling(3.0)})
    slopes = backend.tensor(model, slope)

    def loss(result: Any) -> dict[str, Tensor]:
        return {"loss": backend.ops.sum(tensors_in(result.output)[0] * slopes)}

    before = backend.read(model)
    product = float((x @ weight.T * slope).sum())
    expected = {"0.quant_input_factor": np.array(3 * product), "0.quant_weight_factor": np.array(2 * product)}
    expected |= {"0.weight": 6 * slope.T @ x, "0.bias": slope.sum(0)}
    for train in (False, True):
        found = backend.gradients(model, [x], loss, train)
        require(set(found) == set(expected), f"gradients of {sorted(found)}")
        for name, value in expected.items():
            within(name, relative(found[name], value), "gradient_float64")
    optimizer = backend.make_optimizer(model, OptimizerSettings(momentum=0.5))
    optimizer.set_lr(0.01)
    outputs(bench, model, x)
    require(differing(backend.read(model), before) == 0, "gradients or a forward pass changed what is kept")
    backend.train_step(model, optimizer, [x], loss)
    after = backend.read(model)
    for name, value in expected.items():
        within(f"{name} after a step", relative(after[name], before[name] - 0.01 * value), "gradient_float64")
    require({float(after[f"0.quant_{side}_count"]) for side in ("input", "weight")} == {1.0}, "the step is not counted")
    require("0.quant_input_factor/velocity" in optimizer.state(), "the optimizer does not know the factor")
    copy = backend.write(backend.clone(model), after)
    require(differing(backend.read(copy), after) == 0, "what is kept is not read and written")


@case("statistics: held, BatchNorm normalises by them in training steps too")
def held(bench: Bench) -> None:
    """They stay, gradients equal those of eval mode, a clone holds them as well; lifted, they move."""
    backend = bench.backend
    model = backend.hold_statistics(topology(bench, "residual"), True)
    for one in (model, backend.clone(model)):
        before = backend.read(one)
        gradient, still = (backend.gradients(one, [image()], _square(bench), train) for train in (True, False))
        for name in gradient:
            within(name, relative(gradient[name], still[name]), "gradient")
        _step(bench, one)
        after = backend.read(one)
        moved = [name for name in after if "running_" in name and not np.array_equal(before[name], after[name])]
        require(not moved, f"held statistics moved: {moved}")
        require(not np.array_equal(before["fc.weight"], after["fc.weight"]), "the step changed no weights")
    model = backend.hold_statistics(model, False)
    before = backend.read(model)
    _step(bench, model)
    after = backend.read(model)
    still_there = [name for name in after if "running_" in name and np.array_equal(before[name], after[name])]
    require(not still_there, f"statistics that are no longer held stay: {still_there}")


def _square(bench: Bench) -> Any:
    ops = bench.backend.ops
    return lambda result: {"loss": ops.mean(tensors_in(result.output)[0] ** 2)}


def _step(bench: Bench, model: Model) -> None:
    optimizer = bench.backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.01)
    bench.backend.train_step(model, optimizer, [image()], _square(bench))
