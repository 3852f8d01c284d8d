"""Cases on `ops`: each operation against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from slimbridge.conformance.suite import Bench, case, require, within
from slimbridge.parity.measure import relative
from slimbridge.ports import Array

A = np.linspace(-3, 4, 24).reshape(2, 3, 4)
POSITIVE = np.abs(A) + 0.5


def _log_softmax(x: Array, axis: int) -> Array:
    shifted = x - x.max(axis=axis, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True)))


_CHECKS: dict[str, tuple[Callable[[Any, Any], Any], Array]] = {
    "sum": (lambda ops, x: ops.sum(x), A.sum()),
    "sum over axes": (lambda ops, x: ops.sum(x, axis=(0, 2), keepdims=True), A.sum((0, 2), keepdims=True)),
    "mean": (lambda ops, x: ops.mean(x, axis=1), A.mean(1)),
    "max": (lambda ops, x: ops.max(x, axis=(1, 2)), A.max((1, 2))),
    "max of all": (lambda ops, x: ops.max(x), A.max()),
    "abs": (lambda ops, x: ops.abs(x), np.abs(A)),
    "exp": (lambda ops, x: ops.exp(x), np.exp(A)),
    "log": (lambda ops, x: ops.log(ops.abs(x) + 0.5), np.log(POSITIVE)),
    "sqrt": (lambda ops, x: ops.sqrt(ops.abs(x) + 0.5), np.sqrt(POSITIVE)),
    "relu": (lambda ops, x: ops.relu(x), np.maximum(A, 0)),
    "clip": (lambda ops, x: ops.clip(x, -1.0, 2.0), np.clip(A, -1, 2)),
    "where": (lambda ops, x: ops.where(x > 0, x, x * 2.0), np.where(A > 0, A, 2 * A)),
    "softmax": (lambda ops, x: ops.softmax(x, 1), np.exp(_log_softmax(A, 1))),
    "log_softmax": (lambda ops, x: ops.log_softmax(x, -1), _log_softmax(A, -1)),
    "constant": (lambda ops, x: ops.constant(A, x) + 0.0 * x, A),
    "reshape": (lambda ops, x: ops.reshape(x, (4, 6)), A.reshape(4, 6)),
    "transpose": (lambda ops, x: ops.transpose(x, (2, 0, 1)), A.transpose(2, 0, 1)),
    "concat": (lambda ops, x: ops.concat([x, x * 2.0], 2), np.concatenate([A, 2 * A], 2)),
    "matmul": (lambda ops, x: x @ ops.transpose(x, (0, 2, 1)), A @ A.transpose(0, 2, 1)),
}


@case("ops: values equal NumPy's")
def values(bench: Bench) -> None:
    """Every operation, shape and value."""
    ops, model = bench.backend.ops, _anchor(bench)
    x = bench.backend.tensor(model, A.astype(np.float32))
    for name, (compute, expected) in _CHECKS.items():
        found = ops.numpy(compute(ops, x))
        require(found.shape == np.shape(expected), f"{name}: shape {found.shape}, expected {np.shape(expected)}")
        within(name, relative(found, np.asarray(expected)), "operation")


@case("ops: round goes half to even")
def rounding(bench: Bench) -> None:
    """Ties, negative numbers, and magnitudes where float32 has no fractions left."""
    model = _anchor(bench)
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 0.49999997, 126.5, 8388609.0, -16777216.0], np.float32)
    found = bench.backend.ops.numpy(bench.backend.ops.round(bench.backend.tensor(model, x)))
    require(np.array_equal(found, np.rint(x)), f"round({x.tolist()}) gave {found.tolist()}")


@case("ops: one_hot takes dtype and classes")
def one_hot(bench: Bench) -> None:
    """Integer labels of two axes."""
    model = _anchor(bench)
    labels = np.array([[0, 2], [1, 1]])
    like = bench.backend.tensor(model, A.astype(np.float32))
    found = bench.backend.ops.numpy(bench.backend.ops.one_hot(bench.backend.tensor(model, labels), 3, like))
    require(found.dtype == np.float32, f"one_hot gave {found.dtype}, expected float32")
    require(np.array_equal(found, np.eye(3)[labels]), "one_hot puts the ones elsewhere")


def _anchor(bench: Bench) -> Any:
    """A model, so that tensors have a device to be on."""
    return bench.backend.place(bench.backend.nn.Linear(2, 2), bench.device)
