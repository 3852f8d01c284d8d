"""The ONNX file of an export: a framework's float file, cleaned, and quantized where there is a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slimbridge.decisions import QuantizeDecision
from slimbridge.deploy.onnx_clean import clean
from slimbridge.deploy.onnx_net import failures, require
from slimbridge.deploy.onnx_qdq import QdqReport, quantize
from slimbridge.errors import ModelError, first_line, listed
from slimbridge.files import write_file
from slimbridge.ports import Array


def write_onnx(
    path: Path,
    decision: QuantizeDecision | None,
    weights: Mapping[str, Array],
    sites: Mapping[str, Array],
    inputs: Sequence[Array],
) -> tuple[str, ...]:
    """Rewrite a framework's float file in place.

    Args:
        path: the file; what it holds is replaced all at once.
        decision: None leaves it a float file.
        weights, sites, inputs: as for `onnx_qdq.quantize`.

    Returns:
        What a user should know, one line each.

    Raises:
        ModelError: the file cannot be read, cleaned or quantized.
        BackendError: onnx or onnxruntime is not installed.
    """
    onnx = require("onnx")
    try:
        model = onnx.load(str(path))
    except failures() as error:
        raise ModelError(f"{path}: not an ONNX file: {first_line(error)}") from error
    model, notes = clean(model), list[str]()
    if decision is not None:
        model, report = quantize(model, decision, weights, sites, inputs)
        notes.extend(lines(report))
    write_file(path, model.SerializeToString())
    return tuple(notes)


def lines(report: QdqReport) -> tuple[str, ...]:
    """A report in words."""
    summary = (
        f"{report.weights} of {report.layers} convolution and linear layers have integer weights, "
        f"{report.inputs} of them integer inputs too"
    )
    lost = (f"not found in the ONNX file, left in float: {listed(report.unmatched)}",) if report.unmatched else ()
    return (summary, *lost, *report.notes)
