"""What the PyTorch backend exports in float: ONNX, and programs for torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from slimbridge.decisions import QuantParams, Site
from slimbridge.errors import BackendError, ModelError
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.quantize.fake import Static
from slimbridge.quantize.fold import find_folds, fold_weights
from slimbridge_torch import create, export

BACKEND = create()
IMAGE = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
BATCH = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    """A convolution with BatchNorm, a residual addition whose ReLU runs twice, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Any) -> Any:
        x = self.relu(self.bn(self.stem(x)))
        return self.fc(self.drop(self.relu(self.conv(x) + x).mean((2, 3))))


def net() -> Any:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    return model


def outputs(model: Any, x: Any) -> Any:
    return BACKEND.ops.numpy(BACKEND.forward(model, [x]).output)


def run(folder: Path, x: Any) -> Any:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_onnx_computes_what_the_model_computes_for_any_batch(tmp_path: Path) -> None:
    model = net()
    BACKEND.export(model, [IMAGE], tmp_path, "onnx_float")
    for x in (IMAGE, BATCH):
        assert relative(run(tmp_path, x), outputs(model, x)) <= tolerance("forward").value
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert 17 <= onnx.load(tmp_path / "model.onnx").opset_import[0].version <= 21


def test_onnx_export_is_quiet_and_leaves_the_model_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = net().train()
    before = BACKEND.read(model)
    BACKEND.export(model, [IMAGE], tmp_path, "onnx_float")
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(np.array_equal(array, before[name]) for name, array in BACKEND.read(model).items())


def test_onnx_holds_folded_weights_bit_by_bit_under_their_names(tmp_path: Path) -> None:
    model = net()
    folds = find_folds(BACKEND.trace(model, [IMAGE]), ["stem.weight"])
    weights = BACKEND.read(model)
    assert len(folds) == 1
    BACKEND.write(model, fold_weights(weights, folds), partial=True)
    BACKEND.export(model, [IMAGE], tmp_path, "onnx_float")
    graph = onnx.load(tmp_path / "model.onnx").graph
    held = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = BACKEND.read(model)
    for name in ("stem.weight", "conv.weight", "fc.weight"):
        assert np.array_equal(held[name], weights[name])
    assert "BatchNormalization" not in [node.op_type for node in graph.node]


def test_onnx_has_no_fake_quantization_and_float32_whatever_the_model_has(tmp_path: Path) -> None:
    model = net()
    expected = outputs(model, BATCH)
    BACKEND.place(model, dtype="float64")
    site = Site("conv")
    BACKEND.insert_quant(model, {site: Static.of(QuantParams(step=(0.5,), low=0, high=3), str(site))})
    BACKEND.export(model, [IMAGE], tmp_path, "onnx_float")
    assert relative(run(tmp_path, BATCH), expected) <= tolerance("forward").value
    assert relative(outputs(model, BATCH), expected) > tolerance("forward").value


def test_a_model_that_fixes_its_batch_is_exported_with_it(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.relu(x).reshape(3, 192)

    BACKEND.export(Fixed(), [BATCH], tmp_path, "onnx_float")
    assert np.array_equal(run(tmp_path, BATCH), np.maximum(BATCH, 0).reshape(3, 192))


def test_a_model_that_looks_at_data_is_a_model_error(tmp_path: Path) -> None:
    class Looks(nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1 if x.sum() > 0 else x

    for form in ("onnx_float", "compile_float"):
        with pytest.raises(ModelError, match=r"export: torch.*export failed: \w+: .+") as found:
            BACKEND.export(Looks(), [BATCH], tmp_path, form)
        assert str(found.value).count("\n") <= 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_form_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no form 'onnx_int'.*onnx_float.*it has onnx_float, compile_float, pt2e"):
        BACKEND.export(net(), [IMAGE], tmp_path, "onnx_int")
    with pytest.raises(BackendError, match="runs no 'onnx_float'; it runs compile_float, pt2e"):
        BACKEND.load_exported(tmp_path, "onnx_float", 1)


def test_onnx_without_its_packages_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "onnx_float" in BACKEND.capabilities().forms
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert "onnx_float" not in BACKEND.capabilities().forms
    with pytest.raises(BackendError, match=r"onnx and onnxscript.*\n?.*pip install 'slimbridge\[torch\]'"):
        BACKEND.export(net(), [IMAGE], tmp_path, "onnx_float")


def test_compiled_float_computes_what_the_model_computes(tmp_path: Path) -> None:
    model = net()
    BACKEND.export(model, [IMAGE], tmp_path, "compile_float")
    (found,) = BACKEND.load_exported(tmp_path, "compile_float", 1)([BATCH])
    assert relative(found, outputs(model, BATCH)) <= tolerance("forward").value


def test_a_missing_program_and_a_missing_compiler_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"program\.pt2: cannot be read"):
        BACKEND.load_exported(tmp_path, "pt2e", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendError, match="'pt2e' is compiled with a C\\+\\+ compiler"):
        BACKEND.load_exported(tmp_path, "pt2e", 1)
