"""What the backend writes: ONNX in float, and programs of `torch.export` that `torch.compile` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from slimbridge.decisions import QuantizeDecision, Site
from slimbridge.errors import FAILURES, BackendError, ModelError, first_line, listed, nearest
from slimbridge.ports import Array, FakeQuant
from slimbridge_torch import pt2e
from slimbridge_torch.trace import silent

Tensor = Any

ONNX_FLOAT = "onnx_float"
_OPSET = 18
_LARGEST = 2_000_000_000
"""Bytes of weights that one protobuf file holds; above, they go into a file beside it."""


def forms() -> tuple[str, ...]:
    """The forms that can be written here; packages are looked up, not imported."""
    return (*(() if _missing() else (ONNX_FLOAT,)), *pt2e.FORMS)


def runtimes() -> dict[str, str]:
    """Form -> what `load` runs it in."""
    return dict.fromkeys(pt2e.FORMS, f"torch.compile {torch.__version__}")


def quants(form: str, decision: QuantizeDecision | None) -> dict[Site, FakeQuant]:
    """What must be inserted into the model before `export` of a form.

    Raises:
        BackendError: there is no such form, or it cannot express the decision.
    """
    if form not in (ONNX_FLOAT, *pt2e.FORMS):
        hint = nearest(form, forms())
        raise BackendError(f"export: the torch backend has no form '{form}'{hint}; it has {listed(forms())}")
    return pt2e.quants(decision) if form == pt2e.PT2E else {}


def export(
    model: nn.Module, inputs: Sequence[Tensor], folder: Path, form: str, decision: QuantizeDecision | None
) -> None:
    """Write `model`, a copy that is used up, into an empty folder.

    The first axis stays free where the model allows it; an example of one sample is given twice for that.

    Args:
        model: float32, on the CPU, with the form's `quants` and no others; folds and integer weights are in it.
        inputs: example tensors.
        folder: it exists.
        form: one of `forms`.
        decision: for "pt2e".

    Raises:
        BackendError, ModelError: see `slimbridge.ports.Backend.export`.
    """
    model.eval()
    with _quiet():
        if form == ONNX_FLOAT:
            _write_onnx(model, inputs, folder / "model.onnx")
            return
        if form == pt2e.PT2E and decision is not None:
            pt2e.put_integers(model, decision.weights)
        pt2e.export(model, inputs, folder)


def load(folder: Path, form: str, threads: int) -> Callable[[Sequence[Array]], list[Array]]:
    """A function that runs what `export` wrote.

    Raises:
        BackendError: the backend does not run this form, or needs a compiler for it that is not there.
        ModelError: the file is missing or damaged.
    """
    if form not in pt2e.FORMS:
        raise BackendError(f"the torch backend runs no '{form}'; it runs {listed(pt2e.FORMS)}")
    return pt2e.load(folder, form, threads)


def _missing() -> list[str]:
    return [name for name in ("onnx", "onnxscript") if find_spec(name) is None]


@contextmanager
def _quiet() -> Iterator[None]:
    """No output, no gradients, and attention as products and a softmax, which every runtime knows."""
    with silent(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        yield


def _write_onnx(model: nn.Module, inputs: Sequence[Tensor], target: Path) -> None:
    if _missing():
        raise BackendError(
            f"export: '{ONNX_FLOAT}' needs the package {' and '.join(_missing())}, which is not installed: "
            "pip install 'slimbridge[torch]'"
        )
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    options = {"dynamo": True, "opset_version": _OPSET, "external_data": size > _LARGEST, "verbose": False}
    free = pt2e.doubled(inputs)
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if x.ndim else None for x in free)
    try:
        try:
            torch.onnx.export(model, free, target, dynamic_shapes=shapes, **options)
        except FAILURES:
            torch.onnx.export(model, tuple(inputs), target, **options)
    except FAILURES as error:
        target.unlink(missing_ok=True)
        raise ModelError(f"export: torch.onnx.export failed: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of the innermost cause: the exporters wrap what went wrong in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"
