"""Int8 ONNX files against a NumPy simulation of their grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from slimbridge.decisions import DynamicGrid, QuantizeDecision, QuantParams
from slimbridge.deploy.onnx_clean import clean
from slimbridge.deploy.onnx_file import write_onnx
from slimbridge.deploy.onnx_net import run_all
from slimbridge.deploy.onnx_qdq import QdqReport, quantize
from slimbridge.deploy.onnx_run import fusion, open_runtime
from slimbridge.errors import ModelError
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.quantize.grid import to_integers, to_reals

CLOSE = tolerance("forward").value


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, pad: int) -> np.ndarray:
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight.astype(np.float64)) + bias[:, None, None]


def fake(x: np.ndarray, grid: QuantParams | None) -> np.ndarray:
    return x if grid is None else to_reals(to_integers(x, grid), grid).astype(np.float64)


def weight_grid(weight: np.ndarray, bits: int = 8, signed: bool = True) -> QuantParams:
    rows, top = weight.reshape(len(weight), -1), 2 ** (bits - 1) - 1
    if signed:
        step = (np.abs(rows).max(1) / top).astype(np.float32)
        return QuantParams(step=tuple(step.tolist()), zero_point=(0,) * len(rows), low=-top, high=top, axis=0)
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    step = ((high - low) / (2**bits - 1)).astype(np.float32)
    zero = tuple(int(number) for number in np.rint(-low / step))
    return QuantParams(step=tuple(step.tolist()), zero_point=zero, low=0, high=2**bits - 1, axis=0)


def on_grid(weight: np.ndarray, grid: QuantParams) -> np.ndarray:
    return to_reals(to_integers(weight, grid), grid)


GRIDS = {
    "unsigned": lambda top: QuantParams(step=(float(np.float32(top / 255)),), low=0, high=255),
    "signed": lambda top: QuantParams(step=(float(np.float32(top / 127)),), low=-128, high=127),
    "shifted": lambda top: QuantParams(step=(float(np.float32(2 * top / 255)),), zero_point=(128,), low=0, high=255),
    "skewed": lambda top: QuantParams(step=(float(np.float32(1.4 * top / 255)),), zero_point=(70,), low=0, high=255),
    "odd": lambda top: QuantParams(step=(float(np.float32(top / 127)),), low=-127, high=127),
    "four": lambda top: QuantParams(step=(float(np.float32(top / 7)),), low=-8, high=7),
    "four_unsigned": lambda top: QuantParams(step=(float(np.float32(top / 15)),), low=0, high=15),
}


@dataclass
class Block:
    """Conv, relu (relu6), conv, residual add, pool, linear, with the values that its tensors have."""

    relu6: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        self.weights = {
            "a.weight": draw.standard_normal((6, 3, 3, 3)).astype(np.float32),
            "b.weight": (draw.standard_normal((6, 6, 1, 1)) / 2).astype(np.float32),
            "fc.weight": draw.standard_normal((4, 6)).astype(np.float32),
        }
        self.biases = {
            name: draw.standard_normal(size).astype(np.float32) for name, size in (("a", 6), ("b", 6), ("fc", 4))
        }
        self.x = draw.standard_normal((2, 3, 8, 8)).astype(np.float32) * 2
        self.grids: dict[str, QuantParams] = {}

    def run(self, grids: Mapping[str, QuantParams]) -> dict[str, np.ndarray]:
        """Values of the sites before they are put on their grids, and the output."""
        values, seen = {"a": self.x.astype(np.float64)}, lambda key: fake(values[key], grids.get(key))
        biases = {**self.biases, "fc": self.last_bias(grids.get("fc"))}
        relu = lambda x: np.clip(x, 0, 6 if self.relu6 else None)  # noqa: E731
        values["relu:output"] = relu(convolved(seen("a"), self.weights["a.weight"], biases["a"], 1))
        values["b:output"] = convolved(seen("relu:output"), self.weights["b.weight"], biases["b"], 0)
        values["pool"] = relu(seen("relu:output") + seen("b:output"))
        values["fc"] = seen("pool").mean((2, 3))
        values["out"] = seen("fc") @ self.weights["fc.weight"].T.astype(np.float64) + biases["fc"]
        return values

    def last_bias(self, grid: QuantParams | None) -> np.ndarray:
        """In integers of the product of the steps, where the layer's input is on a grid."""
        weight = self.grids.get("fc.weight")
        if grid is None or weight is None or any(weight.zero_point):
            return self.biases["fc"]
        step = np.float64(np.float32(grid.step[0]) * np.asarray(weight.step, np.float32))
        return np.rint(self.biases["fc"] / step) * step

    def model(self) -> onnx.ModelProto:
        made = {name: array for name, array in self.weights.items() if name != "fc.weight"}
        made |= {f"{name}.bias": array for name, array in self.biases.items()}
        made |= {"fc.weight": self.weights["fc.weight"].T.copy(), "zero": np.float32(0), "six": np.float32(6)}
        kind, extra = ("Clip", ["zero", "six"]) if self.relu6 else ("Relu", [])
        nodes = [
            helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["t1"], pads=[1, 1, 1, 1]),
            helper.make_node(kind, ["t1", *extra], ["t2"]),
            helper.make_node("Conv", ["t2", "b.weight", "b.bias"], ["t3"]),
            helper.make_node("Add", ["t2", "t3"], ["t4"]),
            helper.make_node(kind, ["t4", *extra], ["t5"]),
            helper.make_node("GlobalAveragePool", ["t5"], ["t6"]),
            helper.make_node("Flatten", ["t6"], ["t7"]),
            helper.make_node("MatMul", ["t7", "fc.weight"], ["t8"]),
            helper.make_node("Add", ["t8", "fc.bias"], ["out"]),
        ]
        return file_of(nodes, {"x": self.x.shape}, {"out": (2, 4)}, made)


def file_of(
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
    constants: Mapping[str, Any],
    opset: int = 17,
) -> onnx.ModelProto:
    info = lambda shapes: [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in shapes.items()]  # noqa: E731
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(list(nodes), "net", info(inputs), info(outputs), stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def decided(
    block: Block, chosen: Mapping[str, str], bits: int = 8, signed: bool = True, **more: Any
) -> QuantizeDecision:
    """Grids for the weights (which then lie on them) and for the named sites, from the float values."""
    grids = {name: weight_grid(weight, bits, signed) for name, weight in block.weights.items()}
    block.weights = {name: on_grid(weight, grids[name]) for name, weight in block.weights.items()}
    block.grids = grids
    values = block.run({})
    sites = {key: GRIDS[kind](float(np.abs(values[key]).max())) for key, kind in chosen.items()}
    return QuantizeDecision(observer="absmax", weights=grids, activations=sites, **more)


def written(block: Block, decision: QuantizeDecision) -> tuple[onnx.ModelProto, QdqReport]:
    values = block.run({})
    sites = {key: values[key].astype(np.float32) for key in decision.activations}
    return quantize(clean(block.model()), decision, block.weights, sites, [block.x])


def as_written(
    model: onnx.ModelProto, folder: Path, inputs: Sequence[np.ndarray], optimise: bool = False
) -> np.ndarray:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return open_runtime(path, "onnxruntime", optimise=optimise)(inputs)[0]


ALL = {"a": "signed", "relu:output": "unsigned", "b:output": "signed", "pool": "unsigned", "fc": "unsigned"}


@pytest.mark.parametrize("relu6", [False, True])
@pytest.mark.parametrize("kind", GRIDS)
def test_static_is_the_simulation(tmp_path: Path, kind: str, relu6: bool) -> None:
    block = Block(relu6)
    unsigned = "four_unsigned" if kind.startswith("four") else "unsigned"
    inner = "skewed" if kind in ("unsigned", "four_unsigned") else kind
    chosen = {"a": inner, "relu:output": kind, "b:output": inner, "pool": kind, "fc": unsigned}
    decision = decided(block, chosen)
    model, report = written(block, decision)
    expected = block.run(decision.activations)["out"]
    assert relative(as_written(model, tmp_path, [block.x]), expected) <= CLOSE
    assert (report.layers, report.weights, report.inputs, report.unmatched) == (3, 3, 3, ())
    assert set(report.placed) == set(chosen)
    assert not [item for item in model.graph.node if item.op_type == "Relu"]


@pytest.mark.parametrize(("bits", "signed"), [(8, True), (4, True), (8, False), (5, False)])
def test_weights_are_integers(tmp_path: Path, bits: int, signed: bool) -> None:
    block = Block()
    decision = decided(block, ALL, bits, signed)
    model, _ = written(block, decision)
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    assert not [name for name, array in stored.items() if array.dtype == np.float32 and array.ndim > 1]
    assert stored["a.weight/integers"].dtype == np.int8
    expected = block.run(decision.activations)["out"]
    assert relative(as_written(model, tmp_path, [block.x]), expected) <= CLOSE


def test_everything_runs_in_integers(tmp_path: Path) -> None:
    block = Block()
    model, _ = written(block, decided(block, {**ALL, "relu:output": "signed", "b:output": "odd"}))
    onnx.save(model, tmp_path / "model.onnx")
    fused = fusion(tmp_path / "model.onnx")
    assert fused.counts == {"convolutions": (2, 2), "linear layers": (1, 1), "adds": (1, 1), "average pools": (1, 1)}
    assert str(fused).startswith("2 of 2 convolutions, 1 of 1 linear layers")
    optimised = as_written(model, tmp_path, [block.x], optimise=True)
    plain = as_written(model, tmp_path, [block.x])
    assert relative(optimised, plain) <= tolerance("forward_quantized").value
    vino = open_runtime(tmp_path / "model.onnx", "openvino")([block.x])[0]
    assert relative(vino, plain) <= tolerance("forward_quantized").value


def test_a_layers_own_input_leaves_other_readers_alone(tmp_path: Path) -> None:
    block = Block()
    decision = decided(block, {"a": "signed", "fc": "unsigned"})
    values = block.run({})
    own = GRIDS["unsigned"](float(values["relu:output"].max()))
    decision = decision.model_copy(update={"activations": {**decision.activations, "b": own}})
    sites = {"a": values["a"], "fc": values["fc"], "b": values["relu:output"]}
    float_sites = {key: value.astype(np.float32) for key, value in sites.items()}
    model, report = quantize(clean(block.model()), decision, block.weights, float_sites, [block.x])
    assert report.inputs == 3
    seen = np.clip(
        convolved(fake(values["a"], decision.activations["a"]), block.weights["a.weight"], block.biases["a"], 1),
        0,
        None,
    )
    branch = convolved(fake(seen, own), block.weights["b.weight"], block.biases["b"], 0)
    pooled = fake(np.clip(seen + branch, 0, None).mean((2, 3)), decision.activations["fc"])
    expected = pooled @ block.weights["fc.weight"].T + block.last_bias(decision.activations["fc"])
    assert relative(as_written(model, tmp_path, [block.x]), expected) <= CLOSE


def test_only_weights(tmp_path: Path) -> None:
    for bits, size in ((8, 1), (4, 0.5)):
        block = Block()
        model, report = written(block, decided(block, {}, bits, mode="weight_only"))
        assert (report.weights, report.inputs) == (3, 0)
        assert any("not faster" in note for note in report.notes)
        stored = {item.name: item for item in model.graph.initializer}
        assert len(stored["a.weight/integers"].raw_data or stored["a.weight/integers"].int32_data) <= 162 * size
        expected = block.run({})["out"]
        for optimise in (False, True):
            assert relative(as_written(model, tmp_path, [block.x], optimise), expected) <= CLOSE
        assert relative(open_runtime(tmp_path / "model.onnx", "openvino")([block.x])[0], expected) <= CLOSE


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_groups(tmp_path: Path, bits: int) -> None:
    block, top = Block(), 2 ** (bits - 1) - 1
    grids = {}
    for name, group in (("fc.weight", 2), ("a.weight", 9)):
        rows = np.abs(block.weights[name].reshape(-1, group)).max(1)
        step = tuple((rows / top).astype(np.float32).tolist())
        grids[name] = QuantParams(step=step, zero_point=(0,) * len(step), low=-top, high=top, axis=0, group=group)
        block.weights[name] = on_grid(block.weights[name], grids[name])
    decision = QuantizeDecision(observer="absmax", mode="weight_only", weights=grids)
    model, report = written(block, decision)
    assert (report.weights, model.opset_import[0].version) == (2, 21)
    assert relative(as_written(model, tmp_path, [block.x]), block.run({})["out"]) <= CLOSE
    assert relative(as_written(model, tmp_path, [block.x], optimise=True), block.run({})["out"]) <= CLOSE


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("low", "high", "symmetric"), [(0, 255, False), (-127, 127, True), (-7, 7, True)])
def test_steps_at_run_time(tmp_path: Path, low: int, high: int, symmetric: bool, signed: bool) -> None:
    """Two layers in a row, so that the names of one are not the other's."""
    draw, biases = np.random.default_rng(3), {"p.b": np.ones(6, np.float32), "q.b": np.zeros(4, np.float32)}
    x = draw.standard_normal((5, 6)).astype(np.float32)
    weights = {
        name: draw.standard_normal(shape).astype(np.float32)
        for name, shape in (("p.weight", (6, 6)), ("q.weight", (4, 6)))
    }
    grids = {name: weight_grid(weight, signed=signed) for name, weight in weights.items()}
    weights = {name: on_grid(weight, grids[name]) for name, weight in weights.items()}
    nodes = [
        helper.make_node("Gemm", ["x", "p.weight", "p.b"], ["linear"], transB=1),
        helper.make_node("Gemm", ["linear", "q.weight", "q.b"], ["y"], transB=1),
    ]
    model = clean(file_of(nodes, {"x": x.shape}, {"y": (5, 4)}, {**weights, **biases}))
    dynamic = {name: DynamicGrid(low=low, high=high, symmetric=symmetric) for name in ("p", "q")}
    decision = QuantizeDecision(observer="none", mode="dynamic", weights=grids, dynamic=dynamic)
    made, report = quantize(model, decision, weights, {"p": x, "q": run_all(model, [x])["linear"]}, [x])
    assert (report.weights, report.inputs, report.notes) == (2, 2, ())
    seen = x
    for name in ("p", "q"):
        bottom, top = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
        step = np.float32(max(-bottom, top) / high if symmetric else (top - bottom) / 255)
        zero = 0 if symmetric else int(np.rint(-bottom / step))
        own = QuantParams(step=(float(step),), zero_point=(zero,), low=low, high=high)
        seen = fake(seen, own) @ weights[f"{name}.weight"].T.astype(np.float64) + biases[f"{name}.b"]
    for optimise in (False, True):
        assert relative(as_written(made, tmp_path, [x], optimise), seen) <= CLOSE
    assert fusion(tmp_path / "model.onnx").counts["linear layers"] == (2, 2)
    zeros = np.zeros((5, 6), np.float32)
    assert np.isfinite(as_written(made, tmp_path, [zeros])).all()


def test_convolutions_have_no_steps_at_run_time(tmp_path: Path) -> None:
    block = Block()
    decision = decided(block, {}, mode="dynamic", dynamic={"a": DynamicGrid(low=-128, high=127, symmetric=True)})
    model, report = quantize(clean(block.model()), decision, block.weights, {"a": block.x}, [block.x])
    assert report.inputs == 0
    assert "a.weight: only linear layers compute with steps found at run time" in report.notes[0]
    assert relative(as_written(model, tmp_path, [block.x]), block.run({})["out"]) <= CLOSE


def test_a_bias_too_large_stays_in_float(tmp_path: Path) -> None:
    block = Block()
    block.biases["fc"] = np.full(4, 1e9, np.float32)
    decision = decided(block, {"a": "signed"})
    grids = {**decision.activations, "fc": QuantParams(step=(2.0**-20,), low=0, high=255)}
    model, report = written(block, decision.model_copy(update={"activations": grids}))
    assert any(note.startswith("fc.weight: its bias is too large") for note in report.notes)
    assert np.isfinite(as_written(model, tmp_path, [block.x])).all()


def test_what_has_no_counterpart_is_named() -> None:
    block = Block()
    decision = decided(block, ALL)
    sites = {key: value.astype(np.float32) for key, value in block.run({}).items() if key in ALL}
    sites["pool"] = sites["pool"][::-1] * 2
    del sites["fc"]
    _, report = quantize(clean(block.model()), decision, block.weights, sites, [block.x])
    assert report.unmatched == ("pool", "fc")


def test_refused() -> None:
    block = Block()
    decision = decided(block, ALL)
    sites = {key: value.astype(np.float32) for key, value in block.run({}).items() if key in ALL}
    model = clean(block.model())
    with pytest.raises(ModelError, match=r"no values for the quantized weights a\.weight"):
        quantize(model, decision, {}, sites, [block.x])
    draw = np.random.default_rng(5)
    other = {name: draw.standard_normal(weight.shape).astype(np.float32) for name, weight in block.weights.items()}
    with pytest.raises(ModelError, match="none of the quantized weights was found"):
        quantize(model, decision, other, sites, [block.x])
    off = {name: weight_grid(weight, 3) for name, weight in block.weights.items()}
    with pytest.raises(ModelError, match=r"a\.weight: its values are not on its grid"):
        quantize(model, decision.model_copy(update={"weights": off}), block.weights, sites, [block.x])
    several = {
        **decision.activations,
        "a": QuantParams(step=(0.1, 0.2, 0.3), zero_point=(0,) * 3, low=-128, high=127, axis=1),
    }
    with pytest.raises(ModelError, match="a: activations of an ONNX file have one step"):
        quantize(model, decision.model_copy(update={"activations": several}), block.weights, sites, [block.x])


def test_concatenation_and_movement_share_a_grid(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    x = draw.standard_normal((1, 4, 6, 6)).astype(np.float32)
    shapes = {"p.weight": (3, 4, 1, 1), "q.weight": (5, 4, 1, 1), "r.weight": (4, 8, 1, 1)}
    weights = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    grids = {name: weight_grid(weight) for name, weight in weights.items()}
    weights = {name: on_grid(weight, grids[name]) for name, weight in weights.items()}
    nodes = [
        helper.make_node("Conv", ["x", "p.weight"], ["p"]),
        helper.make_node("Relu", ["p"], ["pr"]),
        helper.make_node("Conv", ["x", "q.weight"], ["q"]),
        helper.make_node("Relu", ["q"], ["qr"]),
        helper.make_node("Concat", ["pr", "qr"], ["c"], axis=1),
        helper.make_node("MaxPool", ["c"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["m", "r.weight"], ["y"]),
    ]
    model = clean(file_of(nodes, {"x": x.shape}, {"y": (1, 4, 3, 3)}, weights))
    values = run_all(model, [x])
    sites = {"p": x, "q": x, "r": values["m"]}
    steps = {"p": GRIDS["signed"](3.0), "q": GRIDS["signed"](3.0), "r": GRIDS["signed"](float(values["m"].max()))}
    decision = QuantizeDecision(observer="absmax", weights=grids, activations=steps)
    made, _ = quantize(model, decision, weights, sites, [x])
    seen, zeros = fake(x, steps["p"]), np.zeros(8)
    joined = [np.clip(convolved(seen, weights[n], zeros[: shapes[n][0]], 0), 0, None) for n in ("p.weight", "q.weight")]
    pooled = np.concatenate(joined, 1).reshape(1, 8, 3, 2, 3, 2).max((3, 5))
    expected = convolved(fake(pooled, steps["r"]), weights["r.weight"], zeros[:4], 0)
    assert relative(as_written(made, tmp_path, [x]), expected) <= CLOSE
    assert fusion(tmp_path / "model.onnx").counts["convolutions"] == (2, 3)  # a float output is made in float
    assert sum(item.op_type == "QuantizeLinear" for item in made.graph.node) == 5


def test_write_onnx(tmp_path: Path) -> None:
    block = Block()
    decision = decided(block, ALL)
    sites = {key: value.astype(np.float32) for key, value in block.run({}).items() if key in ALL}
    path = tmp_path / "model.onnx"
    onnx.save(block.model(), path)
    assert write_onnx(path, None, {}, {}, [block.x]) == ()
    notes = write_onnx(path, decision, block.weights, sites, [block.x])
    assert notes[0] == "3 of 3 convolution and linear layers have integer weights, 3 of them integer inputs too"
    expected = block.run(decision.activations)["out"]
    assert relative(open_runtime(path, "onnxruntime", optimise=False)([block.x])[0], expected) <= CLOSE
    path.write_bytes(b"no")
    with pytest.raises(ModelError, match="not an ONNX file"):
        write_onnx(path, None, {}, {}, [block.x])
