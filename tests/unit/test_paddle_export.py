"""ONNX from Paddle: what is written, run by ONNX Runtime, and how it fails."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")
paddle2onnx = pytest.importorskip("paddle2onnx", reason="paddle2onnx is an optional extra")
onnx = pytest.importorskip("onnx", reason="ONNX is an optional extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge import zoo  # noqa: E402
from slimbridge.decisions import QuantParams, Site  # noqa: E402
from slimbridge.errors import BackendError, ModelError  # noqa: E402
from slimbridge.parity import tolerance  # noqa: E402
from slimbridge.parity.measure import relative  # noqa: E402
from slimbridge.ports import Array  # noqa: E402
from slimbridge.quantize.fake import Static  # noqa: E402
from slimbridge_paddle import export  # noqa: E402

nn = paddle.nn
BACKEND = slimbridge_paddle.create()
IMAGES = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)


def run(folder: Path, inputs: Sequence[Array]) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
    found: list[Array] = session.run(None, {f"input_{index}": array for index, array in enumerate(inputs)})
    return found


class Odd(nn.Layer):
    """Two inputs, a dict of outputs, and one operation of the caller's choice."""

    def __init__(self, operation: Any = None) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.table = nn.Embedding(5, 3)
        self.operation = operation or (lambda x: x)

    def forward(self, *given: Any) -> Any:
        made = self.operation(self.fc(given[0]))
        return {"sum": made + self.table(given[1]), "rest": [made]}


PAIR = [np.linspace(-1, 1, 8).reshape(2, 4).astype(np.float32), np.array([0, 4])]


@pytest.mark.parametrize("name", ["resnet18_small", "mobilenet_v2_small", "mobilenet_v3_small"])
def test_models_of_the_zoo(name: str, tmp_path: Path, capfd: Any) -> None:
    model = zoo.build(name, BACKEND, 10, 3, seed=0)
    before = BACKEND.read(model)
    images = np.random.default_rng(1).normal(size=(2, 3, 32, 32)).astype(np.float32)
    BACKEND.export(model, [images], tmp_path, "onnx_float")
    assert capfd.readouterr() == ("", "")
    after = BACKEND.read(model)
    assert all(np.array_equal(before[key], after[key]) for key in before) and model.training
    expected = BACKEND.forward(model, [images]).output.numpy()
    assert relative(run(tmp_path, [images])[0], expected) < tolerance("forward").value
    assert relative(run(tmp_path, [images[:1]])[0], expected[:1]) < tolerance("forward").value


def test_weights_have_their_names_and_quantization_is_left_out(tmp_path: Path) -> None:
    model = BACKEND.place(zoo.build("lenet", BACKEND, 10, 1, seed=0), "cpu", "float64")
    image = IMAGES[:1, :1].repeat(4, 2)[:, :, :28].repeat(4, 3)[:, :, :, :28]
    expected = BACKEND.forward(model, [image]).output.numpy()
    path = next(layer.path for layer in BACKEND.layers(model))
    BACKEND.insert_quant(model, {Site(path): Static.of(QuantParams(step=(0.5,), low=-1, high=1), path)})
    assert relative(BACKEND.forward(model, [image]).output.numpy(), expected) > tolerance("forward_quantized").value
    BACKEND.export(model, [image], tmp_path, "onnx_float")
    assert relative(run(tmp_path, [image])[0], expected) < tolerance("forward").value
    graph = onnx.load(tmp_path / "model.onnx").graph
    names = {node.output[0] for node in graph.node if node.op_type == "Constant"} | {i.name for i in graph.initializer}
    assert set(BACKEND.read(BACKEND.insert_quant(model, {}))) <= names
    assert {node.op_type for node in graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear", "Round", "Clip"})


def test_several_inputs_and_nested_outputs(tmp_path: Path) -> None:
    model = Odd()
    BACKEND.export(model, PAIR, tmp_path, "onnx_float")
    expected = BACKEND.forward(model, PAIR).output
    found = run(tmp_path, PAIR)
    assert relative(found[0], expected["sum"].numpy()) < tolerance("forward").value
    assert relative(found[1], expected["rest"][0].numpy()) < tolerance("forward").value


def test_a_crash_of_paddle2onnx_is_an_error_of_one_line(tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(
        ModelError, match=r"^export: paddle2onnx failed: .*unsupported operators.* \(exit status -\d+\)$"
    ):
        BACKEND.export(Odd(paddle.lgamma), PAIR, tmp_path, "onnx_float")
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "") and paddle.in_dynamic_mode()


def test_a_forward_that_depends_on_data(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^export: Paddle cannot save this Odd: TypeError: float\(Tensor\)"):
        BACKEND.export(Odd(lambda x: x if float(x.sum()) > 0 else -x), PAIR, tmp_path, "onnx_float")
    assert paddle.in_dynamic_mode()


def test_unknown_forms_and_a_missing_exporter(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(BackendError, match=r"no form 'tflite'; it has onnx_float, paddle_float, paddle_int8"):
        BACKEND.export(Odd(), PAIR, tmp_path, "tflite")
    assert BACKEND.capabilities().forms == ("onnx_float", "paddle_float", "paddle_int8")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert BACKEND.capabilities().forms == ("paddle_float", "paddle_int8")
    with pytest.raises(BackendError, match=r"paddle2onnx is not installed: pip install 'slimbridge\[paddle\]'"):
        BACKEND.export(Odd(), PAIR, tmp_path, "onnx_float")


def test_keeping_the_exporters_optimizer_out_is_still_needed() -> None:
    assert inspect.signature(paddle2onnx.export).parameters["optimize_tool"].default == "polygraphy"
    assert 'os.environ["POLYGRAPHY_AUTOINSTALL_DEPS"] = "1"' in inspect.getsource(paddle2onnx.export)
