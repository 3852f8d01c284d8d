"""Cleaning, matching and running exported ONNX files, of either exporter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from slimbridge import zoo
from slimbridge.decisions import QuantizeDecision, QuantParams
from slimbridge.deploy import onnx_net
from slimbridge.deploy.onnx_cells import Cell
from slimbridge.deploy.onnx_clean import clean
from slimbridge.deploy.onnx_match import match
from slimbridge.deploy.onnx_net import LAYERS, Net, attributes, run_all
from slimbridge.deploy.onnx_qdq import quantize
from slimbridge.deploy.onnx_run import fusion, open_runtime, runtimes
from slimbridge.discovery import get_backend
from slimbridge.errors import BackendError, ModelError
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import tensors_in
from slimbridge.quantize.grid import to_integers, to_reals

CLOSE = tolerance("forward").value
STANDARD = {"Conv", "Relu", "Clip", "MaxPool", "Add", "GlobalAveragePool", "Reshape", "Flatten", "Gemm"}
GATES = {"HardSwish", "HardSigmoid", "Mul"}


def file_of(
    nodes: list[Any], shape: list[Any], given: list[Any], constants: Mapping[str, Any], opset: int = 17
) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("x", shape), ("y", given)))
    graph = helper.make_graph(nodes, "net", [x], [y], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


CASES = [
    ("torch", "resnet18_small", 32, STANDARD, {"convolutions": 20, "linear layers": 1, "adds": 8, "average pools": 1}),
    (
        "torch",
        "mobilenet_v2_small",
        32,
        STANDARD,
        {"convolutions": 52, "linear layers": 1, "adds": 10, "average pools": 1},
    ),
    ("paddle", "lenet", 28, STANDARD, {"convolutions": 2, "linear layers": 3}),
    (
        *("paddle", "mobilenet_v3_small", 32, STANDARD | GATES),
        {"convolutions": 52, "linear layers": 2, "adds": 6, "average pools": 10},
    ),
]
"""Framework, model, side of its images, operators of the clean file, what is computed in integers."""


class Exported(NamedTuple):
    backend: Any
    model: Any
    x: np.ndarray
    source: onnx.ModelProto
    kinds: set[str]
    integer: dict[str, int]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    framework, name, size, kinds, expected = request.param
    backend = get_backend(framework)
    model = zoo.build(name, backend, 10, seed=0)
    x = np.random.default_rng(0).standard_normal((2, 1 if name == "lenet" else 3, size, size)).astype(np.float32)
    folder = tmp_path_factory.mktemp(name)
    backend.export(model, [x], folder, "onnx_float")
    return Exported(backend, model, x, onnx.load(folder / "model.onnx"), kinds, expected)


def test_clean_and_match(exported: Exported) -> None:
    backend, model, x, source, kinds, _ = exported
    made = clean(source)
    counts = Counter(item.op_type for item in made.graph.node)
    assert set(counts) <= kinds
    layers = [layer for layer in backend.layers(model) if layer.kind in ("conv", "linear")]
    assert counts["Conv"] + counts["Gemm"] == len(layers)
    paths = [layer.path for layer in layers]
    passed = backend.forward(model, [x], capture=paths)
    expected = backend.ops.numpy(tensors_in(passed.output)[0])
    values = run_all(made, [x])
    assert relative(values[made.graph.output[0].name], expected) <= CLOSE

    # The last convolutions and the linear layers have no BatchNorm folded into what they give.
    plain = [layer.path for layer in layers if "bias" in layer.params]
    weights = {f"{path}.weight": backend.read(model)[f"{path}.weight"] for path in plain}
    sites = {f"{path}:output": backend.ops.numpy(passed.features[path]) for path in plain}
    found = match(made, weights, {**sites, "none:output": np.flip(expected)}, [x])
    assert found.unmatched == ("none:output",)
    for path in plain:
        place = found.weights[f"{path}.weight"]
        stored = Net.of(made).constants[place.initialiser]
        assert np.array_equal(stored.T if place.transposed else stored, weights[f"{path}.weight"])
        maker = Net.of(made).makers()[found.sites[f"{path}:output"]]
        assert maker.op_type not in LAYERS or maker.input[1] == place.initialiser


def test_clean_by_hand() -> None:
    draw = np.random.default_rng(0)
    constants = {
        "w": draw.standard_normal((4, 3, 1, 1)).astype(np.float32),
        "three": np.float32(3),
        "zero": np.float32(0),
        "six": np.float32(6),
        "sixth": np.array([1 / 6], np.float32),
        "one": np.array([1], np.float32),
        "axes": np.array([2, 3]),
        "start": np.array([0]),
        "end": np.array([1]),
        "rest": np.array([-1]),
        "m": draw.standard_normal((4, 5)).astype(np.float32),
        "b": draw.standard_normal(5).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Identity", ["c"], ["c1"]),
        helper.make_node("Mul", ["c1", "one"], ["c2"]),
        helper.make_node("Add", ["c2", "three"], ["c3"]),
        helper.make_node("Clip", ["c3", "zero", "six"], ["c4"]),
        helper.make_node("Mul", ["c4", "sixth"], ["c5"]),
        helper.make_node("Mul", ["c1", "c5"], ["c6"]),
        helper.make_node("ReduceMean", ["c6"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("Shape", ["p"], ["s"]),
        helper.make_node("Slice", ["s", "start", "end"], ["s1"]),
        helper.make_node("Concat", ["s1", "rest"], ["s2"], axis=0),
        helper.make_node("Reshape", ["p", "s2"], ["r"]),
        helper.make_node("MatMul", ["r", "m"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["y"]),
    ]
    source = file_of(nodes, ["batch", 3, 4, 4], ["batch", 5], constants)
    made = clean(source)
    kinds = [item.op_type for item in made.graph.node]
    assert [kind for kind in kinds if kind not in ("Flatten", "Reshape")] == [
        "Conv",
        "HardSwish",
        "GlobalAveragePool",
        "Gemm",
    ]
    for batch in (1, 3):
        x = draw.standard_normal((batch, 3, 4, 4)).astype(np.float32) * 3
        assert relative(run_all(made, [x])["y"], run_all(source, [x])["y"]) <= CLOSE


def test_a_site_is_the_tensor_its_layer_reads() -> None:
    draw = np.random.default_rng(0)
    w, square = draw.standard_normal((3, 3, 1, 1)).astype(np.float32), draw.standard_normal((12, 12)).astype(np.float32)
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "m"], ["y"], transB=0),
    ]
    model = file_of(nodes, [2, 3, 2, 2], [2, 12], {"w": np.abs(w), "m": square})
    x = draw.standard_normal((2, 3, 2, 2)).astype(np.float32)
    values = run_all(model, [x])
    assert np.array_equal(values["c"], values["r"])
    sites = {"fc": values["f"], "conv:output": values["c"], "relu:output": values["r"], "conv": values["a"]}
    found = match(model, {"fc.weight": square.T, "conv.weight": np.abs(w)}, sites, [x])
    assert found.sites == {
        "fc": "f",
        "conv:output": "r",
        "relu:output": "f",
        "conv": "a",
    }  # all equal: no two outputs are one tensor
    assert (found.weights["fc.weight"].initialiser, found.weights["fc.weight"].transposed) == ("m", True)
    assert not match(model, {"fc.weight": square}, {}, [x]).weights


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-128, 0),
    st.integers(1, 127),
    st.booleans(),
    st.floats(2**-10, 10, width=32),
    st.floats(0, 8, width=32),
    st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20),
)
def test_a_cell_is_its_grid(low: int, high: int, unsigned: bool, step: float, top: float, entries: list[float]) -> None:
    shift = -low if unsigned else 0
    grid = QuantParams(step=(step,), zero_point=(shift,), low=low + shift, high=high + shift)
    x = np.array(entries, np.float32)
    cell = Cell.of("x", grid)
    assert 0 <= cell.low <= cell.zero <= cell.high <= 255
    for made, value in (
        (cell, x),
        (cell.clipped(0.0, None), np.maximum(x, 0)),
        (cell.clipped(0.0, top), np.clip(x, 0, top)),
    ):
        integers = np.clip(np.clip(np.rint(x / np.float32(made.step)) + made.zero, 0, 255), made.low, made.high)
        reals = (integers - made.zero).astype(np.float32) * np.float32(made.step)
        assert np.array_equal(reals, to_reals(to_integers(value, grid), grid))
    assert cell.holds(cell.clipped(0.0, top))


def decided(model: onnx.ModelProto, x: np.ndarray) -> tuple[onnx.ModelProto, QuantizeDecision, Any, Any]:
    """Grids for what integer kernels read and write: inputs of layers, pairs and pools, and what activations give."""
    net = Net.of(model)
    weights, sites, grids, steps = {}, {}, {}, {}
    for number, item in enumerate(net.nodes):
        reads: dict[str, str] = {}
        if item.op_type in LAYERS:
            weight, name = net.constants[item.input[1]], f"n{number}.weight"
            turned = item.op_type == "Gemm" and not attributes(item).get("transB", 0)
            rows = weight.T if turned else weight
            step = (np.abs(rows.reshape(len(rows), -1)).max(1) / 127).astype(np.float32).tolist()
            grids[name] = QuantParams(step=tuple(step), zero_point=(0,) * len(step), low=-127, high=127, axis=0)
            weights[name] = to_reals(to_integers(rows, grids[name]), grids[name])
            net.constants[item.input[1]] = weights[name].T.copy() if turned else weights[name]
            reads[f"n{number}"] = item.input[0]
        if item.op_type in ("Add", "Mul", "GlobalAveragePool", "HardSwish", "HardSigmoid"):
            reads |= {f"n{number}:input.{place}": name for place, name in enumerate(item.input)}
        sites |= reads
    model = net.model()
    values = run_all(model, [x])
    for key, name in sites.items():
        signed, largest = values[name].min() < 0, float(np.abs(values[name]).max())
        step = float(np.float32(largest / (127 if signed else 255)))
        steps[key] = QuantParams(step=(step,), low=-128 if signed else 0, high=127 if signed else 255)
    decision = QuantizeDecision(observer="absmax", weights=grids, activations=steps)
    return model, decision, weights, {key: values[name] for key, name in sites.items()}


def test_everything_is_computed_in_integers(exported: Exported, tmp_path: Path) -> None:
    model, decision, weights, sites = decided(clean(exported.source), exported.x)
    made, report = quantize(model, decision, weights, sites, [exported.x])
    path = tmp_path / "model.onnx"
    onnx.save(made, path)
    assert report.unmatched == () and report.layers == report.weights == report.inputs
    counts = fusion(path).counts
    counts.pop("products", None)  # hard swishes are written out
    assert counts == {kind: (count, count) for kind, count in exported.integer.items()}
    plain, optimised = (open_runtime(path, "onnxruntime", optimise=o)([exported.x])[0] for o in (False, True))
    assert relative(optimised, plain) <= tolerance("forward_quantized").value
    expected = run_all(model, [exported.x])[model.graph.output[0].name]
    assert float(np.mean(plain.argmax(1) == expected.argmax(1))) == 1


def test_runtimes(tmp_path: Path) -> None:
    assert set(runtimes()) == {"onnxruntime", "openvino"}
    w = np.random.default_rng(0).standard_normal((4, 3, 1, 1)).astype(np.float32)
    model = file_of([helper.make_node("Conv", ["x", "w"], ["y"])], [1, 3, 5, 5], [1, 4, 5, 5], {"w": w})
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    x = np.random.default_rng(1).standard_normal((1, 3, 5, 5)).astype(np.float32)
    expected = np.einsum("nchw,oc->nohw", x.astype(np.float64), w[:, :, 0, 0].astype(np.float64))
    for name in runtimes():
        run = open_runtime(path, name, threads=1)
        assert relative(run([x])[0], expected) <= CLOSE
        with pytest.raises(ModelError, match=f"{name} cannot run it"):
            run([x[:, :2]])
    assert fusion(path).counts == {"convolutions": (0, 1)}
    with pytest.raises(BackendError, match=r"no runtime 'onnxrt' \(did you mean 'onnxruntime'\?\)"):
        open_runtime(path, "onnxrt")
    with pytest.raises(BackendError, match="openvino always optimises"):
        open_runtime(path, "openvino", optimise=False)
    path.write_bytes(b"no")
    for name in runtimes():
        with pytest.raises(ModelError, match=f"{name} cannot load it"):
            open_runtime(path, name)
    with pytest.raises(ModelError, match="onnxruntime cannot load it"):
        fusion(path)


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="has opset 11; needed: 13"):
        clean(file_of([helper.make_node("Relu", ["x"], ["y"])], [1], [1], {}, opset=11))
    branch = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])])
    nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)]
    with pytest.raises(ModelError, match="control flow"):
        clean(file_of(nodes, [1], [1], {"flag": np.array(True)}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        clean(
            file_of([helper.make_node("Gemm", ["x", "w"], ["y"])], [1, 3], [1, 4], {"w": np.zeros((4, 4), np.float32)})
        )
    with pytest.raises(BackendError, match=r"pip install 'slimbridge\[openvino\]'"):
        onnx_net.require("openvino_of_another_name")
    with pytest.raises(BackendError, match=r"pip install 'slimbridge\[deploy\]'"):
        onnx_net.require("onnxruntime_of_another_name")
