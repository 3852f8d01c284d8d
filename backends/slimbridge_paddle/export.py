"""What the backend writes: ONNX in float, and the Paddle Inference programs of `inference`.

paddle2onnx runs in a process of its own: it aborts the process on what it does not know.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slimbridge.decisions import QuantizeDecision
from slimbridge.errors import BackendError, ModelError, listed
from slimbridge.ports import Array
from slimbridge_paddle import inference
from slimbridge_paddle._compat import TO_ONNX
from slimbridge_paddle.names import entries
from slimbridge_paddle.quant import remove_quant
from slimbridge_paddle.tensors import check_list, move

ONNX_FLOAT = "onnx_float"
_OPSET = 17


def forms() -> tuple[str, ...]:
    """The forms that can be written here; paddle2onnx is looked up, not imported."""
    onnx = (ONNX_FLOAT,) if find_spec("paddle2onnx") is not None else ()
    return (*onnx, *inference.FORMS)


def export(model: Any, inputs: Sequence[Array], folder: Path, form: str, decision: QuantizeDecision | None) -> None:
    """Write `model`, a copy that is used up, into an empty folder.

    Args:
        model: its fake quantization is taken out, its folds and integer weights are in it.
        inputs: examples, for the shapes; the first axis stays free where the model allows it.
        folder: it exists.
        form: "onnx_float", "paddle_float" or "paddle_int8".
        decision: for "paddle_int8".

    Raises:
        BackendError, ModelError: see `slimbridge.ports.Backend.export`.
    """
    if form not in (ONNX_FLOAT, *inference.FORMS):
        raise BackendError(f"export: the paddle backend has no form '{form}'; it has {listed(forms())}")
    check_list(inputs)
    remove_quant(model)
    model.eval()
    move(model, "cpu", "float32")
    name_parameters(model)
    if form != ONNX_FLOAT:
        inference.export(model, inputs, folder, form, decision)
        return
    if find_spec("paddle2onnx") is None:
        raise BackendError("export: paddle2onnx is not installed: pip install 'slimbridge[paddle]'")
    with tempfile.TemporaryDirectory() as saved:
        try:
            _write_onnx(model, Path(saved), inference.specs(inputs, free=True), folder / "model.onnx")
        except ModelError:
            _write_onnx(model, Path(saved), inference.specs(inputs, free=False), folder / "model.onnx")


def name_parameters(model: Any) -> None:
    """Give each parameter its canonical name, which it then has in the file too (a copy's names have suffixes)."""
    for entry in entries(model):
        entry.tensor.name = entry.name


def _write_onnx(model: Any, saved: Path, inputs: list[Any], target: Path) -> None:
    inference.save(model, saved / "model", inputs)
    command = [sys.executable, "-c", TO_ONNX, *map(str, (saved / "model", target, _OPSET))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not target.is_file():
        target.unlink(missing_ok=True)
        raise ModelError(f"export: paddle2onnx failed: {_reason(done)}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in f"{done.stderr}\n{done.stdout}".splitlines() if line.strip()]
    telling = [line for line in lines if "Failed to convert" in line or "[ERROR]" in line]
    last = (telling or lines or ["it said nothing"])[-1]
    return f"{last} (exit status {done.returncode})"
