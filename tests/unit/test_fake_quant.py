"""Fake quantizations on fixed grids and on grids made for each tensor, on either backend."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper

from slimbridge.decisions import DynamicGrid, QuantParams
from slimbridge.errors import ModelError
from slimbridge.ports import Array, Backend, Device
from slimbridge.quantize.fake import Dynamic, Recorder, Static
from slimbridge.quantize.formulas import HOST, NORMAL, Constants, symmetric
from slimbridge.quantize.grid import to_integers, to_reals
from tests.quantizing import run

RNG = np.random.default_rng(11)
SHAPE = (4, 3, 6)
X = (RNG.standard_normal(SHAPE) * 3).astype(np.float32)
X[0, 0] = [0.25, 0.75, -0.25, -0.75, 1.25, -1.25]  # halves of steps of 0.5


def some(count: int) -> tuple[float, ...]:
    return tuple(float(step) for step in RNG.uniform(0.01, 0.5, count).astype(np.float32))


GRIDS = {
    "per tensor": QuantParams(step=(0.5,), low=-127, high=127),
    "halves away from zero": QuantParams(step=(0.5,), low=-127, high=127, rounding="away"),
    "clipped": QuantParams(step=(0.5,), low=-3, high=2),
    "with a zero point": QuantParams(step=(0.037,), zero_point=(117,), low=0, high=255),
    "for each row": QuantParams(step=some(4), low=-7, high=7, axis=0),
    "for each channel": QuantParams(step=some(3), zero_point=(1, 0, 9), low=0, high=15, axis=1),
    "one zero point for all": QuantParams(step=some(6), zero_point=(3,), low=0, high=15, axis=2),
    "for each group": QuantParams(step=some(12), low=-7, high=7, axis=0, group=6),
    "for groups over channels": QuantParams(step=some(8), zero_point=tuple(range(8)), low=0, high=15, axis=0, group=9),
}


@pytest.mark.parametrize("name", list(GRIDS))
def test_a_tensor_on_its_grid(backend: Backend, device: Device, name: str) -> None:
    """To the last bit what the integers stand for."""
    grid = GRIDS[name]
    ran = run(backend, device, Static.of(grid, name), X, dtype="float32")
    assert np.array_equal(ran.output, to_reals(to_integers(X, grid), grid))
    assert not ran.changed
    assert set(np.unique(ran.gradients["x"])) <= {0, 1}


def test_clipped_entries_get_no_gradient(backend: Backend, device: Device) -> None:
    x = np.array([[-1.75, -1.2, 0.1, 1.2, 1.3]])
    assert run(backend, device, Static(GRIDS["clipped"]), x).gradients["x"].tolist() == [[0, 1, 1, 1, 0]]


def test_one_object_serves_both_dtypes_and_both_backends(torch_backend: Backend, paddle_backend: Backend) -> None:
    grid = GRIDS["for each channel"]
    quant = Static(grid)
    for backend in (torch_backend, paddle_backend, torch_backend):
        assert np.array_equal(
            run(backend, "cpu", quant, X, dtype="float32").output, to_reals(to_integers(X, grid), grid)
        )
        assert run(backend, "cpu", quant, X, dtype="float64").output.dtype == np.float64
    copied = deepcopy(quant)
    assert not copied._constants._made
    assert np.array_equal(run(torch_backend, "cpu", copied, X).output, run(torch_backend, "cpu", quant, X).output)


BAD = {
    "each step must be positive and finite in float32, found 0.0": {"step": (1.0, 0.0), "axis": 0},
    "each step must be positive and finite in float32, found -1.0": {"step": (-1.0,)},
    "each step must be positive and finite in float32, found nan": {"step": (float("nan"),)},
    "each step must be positive and finite in float32, found 1e-60": {"step": (1e-60,)},
    "each step must be positive and finite in float32, found 1e+60": {"step": (1e60,)},
    "integers 3..3; the first must be below the second": {"low": 3, "high": 3},
    "2 steps without an axis; one is allowed": {"step": (1.0, 2.0)},
    "0 steps without an axis; one is allowed": {"step": ()},
    "3 zero points for 2 steps": {"step": (1.0, 2.0), "axis": 0, "zero_point": (0, 0, 0)},
    "zero_point 128 is outside -127..127": {"zero_point": (128,)},
    "groups must have 1 entry at least, along axis 0; found 4, None": {"group": 4},
    "groups must have 1 entry at least, along axis 0; found 0, 0": {"group": 0, "axis": 0},
}


@pytest.mark.parametrize("message", list(BAD))
def test_a_grid_that_is_not_usable(message: str) -> None:
    grid = QuantParams.model_validate({"step": (1.0,), "low": -127, "high": 127, **BAD[message]})
    with pytest.raises(ModelError) as caught:
        Static.of(grid, "quantize 'conv1'")
    assert str(caught.value) == f"quantize 'conv1': {message}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("for each channel", "fc: 3 steps for 2 channels"),
        ("one zero point for all", "fc: 6 steps for 0 channels"),
        ("for each group", "fc: rows of 2 entries cannot be cut into groups of 6"),
    ],
)
def test_a_tensor_that_does_not_fit(backend: Backend, device: Device, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        run(backend, device, Static(GRIDS[name], "fc"), X[:, 0, :2])


def test_other_rows_than_the_grid_has(backend: Backend, device: Device) -> None:
    with pytest.raises(ModelError, match="fc: 12 steps for 9 groups"):
        run(backend, device, Static(GRIDS["for each group"], "fc"), X[:3])


# Grids made for each tensor

UNSIGNED = DynamicGrid(low=0, high=255, symmetric=False)


def session() -> Any:
    """ONNX Runtime's own: quantize with a step of its choice, and back."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "step", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "dynamic", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


SESSION = session()
FLOATS = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 5)), elements=st.floats(-50, 50, width=16))


@given(x=FLOATS)
def test_a_dynamic_grid_is_that_of_onnx_runtime(backend: Backend, x: Array) -> None:
    ops, model = backend.ops, backend.nn.Linear(1, 1)
    output, changed = Dynamic(UNSIGNED)(ops, backend.tensor(model, x), {}, False)
    (theirs,) = SESSION.run(None, {"x": x})
    assert np.array_equal(ops.numpy(output), theirs)
    assert not changed


@pytest.mark.parametrize("shift", [-20.0, -1.0, 0.0, 1.0, 20.0])
@pytest.mark.parametrize(("low", "high"), [(0, 255), (-128, 127), (0, 15)])
def test_a_dynamic_grid_holds_0_and_the_extremes(
    backend: Backend, device: Device, shift: float, low: int, high: int
) -> None:
    x = np.concatenate([X.ravel() + np.float32(shift), np.zeros(1, np.float32)]).reshape(1, -1)
    output = run(backend, device, Dynamic(DynamicGrid(low=low, high=high, symmetric=False)), x, dtype="float32").output
    step = (x.max() - x.min()) / np.float32(high - low)
    assert output[0, -1] == 0
    assert len(np.unique(output)) <= high - low + 1
    assert np.abs(output - x).max() <= step


@pytest.mark.parametrize(("low", "high"), [(-127, 127), (-128, 127), (-7, 7), (0, 255)])
def test_a_symmetric_dynamic_grid(backend: Backend, device: Device, low: int, high: int) -> None:
    x = np.abs(X) if low == 0 else X
    grid = QuantParams(step=(float(np.abs(x).max() / np.float32(high)),), low=low, high=high)
    ran = run(backend, device, Dynamic(DynamicGrid(low=low, high=high, symmetric=True)), x, dtype="float32")
    assert np.array_equal(ran.output, to_reals(to_integers(x, grid), grid))


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(backend: Backend, device: Device, symmetric: bool) -> None:
    quant = Dynamic(DynamicGrid(low=-127, high=127, symmetric=symmetric))
    assert not run(backend, device, quant, np.zeros((2, 3)), dtype="float32").output.any()


@pytest.mark.parametrize(("low", "high", "symmetric"), [(5, 5, False), (0, 0, True), (1, 255, True), (-128, 0, True)])
def test_integers_that_hold_no_grid(low: int, high: int, symmetric: bool) -> None:
    with pytest.raises(ModelError, match=f"fc: integers {low}..{high}"):
        Dynamic(DynamicGrid(low=low, high=high, symmetric=symmetric), "fc")


def test_a_recorder_lets_all_pass_and_keeps_it(backend: Backend, device: Device) -> None:
    recorder = Recorder()
    assert recorder.value is None
    ran = run(backend, device, recorder, X, dtype="float32")
    assert np.array_equal(ran.output, X)
    assert np.array_equal(recorder.value, X)  # type: ignore[arg-type]
    assert np.array_equal(ran.gradients["x"], np.ones_like(X))
    run(backend, device, recorder, X * 2, dtype="float32")
    assert np.array_equal(recorder.value, X * 2)  # type: ignore[arg-type]


# What they are computed with


@pytest.mark.parametrize("shapes", [((), ()), ((1,), (1,)), ((1000,), (1000,)), ((40, 25), ()), ((40, 25), (25,))])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_quotient_is_rounded_once(backend: Backend, device: Device, shapes: Any, dtype: Any) -> None:
    """On tensors of equal shapes too, where a vector library may be less exact."""
    model = backend.place(backend.nn.Linear(1, 1), device, dtype)
    for _ in range(300 if shapes[0] in ((), (1,)) else 3):
        x, y = (np.asarray(RNG.standard_normal(shape), dtype) for shape in shapes)
        quotient = backend.ops.divide(backend.tensor(model, x), backend.tensor(model, y))
        assert np.array_equal(backend.ops.numpy(quotient), x / y)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_constant_has_the_type_and_place_of_a_tensor(backend: Backend, device: Device, dtype: Any) -> None:
    model = backend.place(backend.nn.Linear(1, 1), device, dtype)
    like = backend.tensor(model, np.zeros(3))
    for array in (np.asarray(0.1), np.array([1, 2, 300])):
        made = backend.ops.constant(array, like)
        assert np.array_equal(backend.ops.numpy(made), array.astype(dtype))
        assert backend.ops.numpy(made + like[0]).dtype == dtype


@pytest.mark.parametrize("limit", [1, 7, 127, 255])
def test_a_step_is_the_same_on_a_backend_as_on_the_host(backend: Backend, device: Device, limit: int) -> None:
    model = backend.place(backend.nn.Linear(1, 1), device)
    constants = Constants()
    thresholds = np.append(np.exp(RNG.uniform(-20, 20, 400)), [0, 1e-40, 1e-37]).astype(np.float32)
    wanted = symmetric(HOST, constants, thresholds, limit)
    exact = thresholds.astype(np.float64) / limit
    assert np.array_equal(wanted, np.where(exact < NORMAL, 1, exact).astype(np.float32))
    found = symmetric(backend.ops, constants, backend.tensor(model, thresholds), limit)
    assert np.array_equal(backend.ops.numpy(found), wanted)
    singles = [symmetric(backend.ops, constants, backend.tensor(model, threshold), limit) for threshold in thresholds]
    assert np.array_equal([backend.ops.numpy(step) for step in singles], wanted)
