"""Cases on `nn`: layers and functions by the names of the port, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import erf, expit, softmax

from slimbridge.conformance.models import output, random
from slimbridge.conformance.suite import Bench, case, require, within
from slimbridge.parity.measure import relative
from slimbridge.ports import Array, Model

X = np.linspace(-4, 4, 36).reshape(1, 2, 3, 6)
_GELU = X * 0.5 * (1 + erf(X / np.sqrt(2)))
_HARD = np.clip(X / 6 + 0.5, 0, 1)

_ACTIVATIONS: dict[str, tuple[Callable[[Any], Any], Array]] = {
    "ReLU": (lambda nn: nn.ReLU(), np.maximum(X, 0)),
    "ReLU6": (lambda nn: nn.ReLU6(), np.clip(X, 0, 6)),
    "LeakyReLU": (lambda nn: nn.LeakyReLU(0.2), np.where(X > 0, X, 0.2 * X)),
    "GELU": (lambda nn: nn.GELU(), _GELU),
    "SiLU": (lambda nn: nn.SiLU(), X * expit(X)),
    "Sigmoid": (lambda nn: nn.Sigmoid(), expit(X)),
    "Hardswish": (lambda nn: nn.Hardswish(), X * _HARD),
    "Hardsigmoid": (lambda nn: nn.Hardsigmoid(), _HARD),
}
_FUNCTIONS: dict[str, tuple[Callable[[Any, Any], Any], Array]] = {
    "sigmoid": (lambda nn, x: nn.sigmoid(x), expit(X)),
    "gelu": (lambda nn, x: nn.gelu(x), _GELU),
    "softmax": (lambda nn, x: nn.softmax(x, 1), softmax(X, axis=1)),
    "matmul": (lambda nn, x: nn.matmul(x, nn.transpose(x, (0, 1, 3, 2))), X @ X.swapaxes(2, 3)),
    "upsample": (lambda nn, x: nn.upsample(x, 2), X.repeat(2, axis=2).repeat(2, axis=3)),
    "pad": (lambda nn, x: nn.pad(x, ((1, 2), (0, 3))), np.pad(X, ((0, 0), (0, 0), (1, 2), (0, 3)))),
    "pad of one axis": (lambda nn, x: nn.pad(x, ((2, 1),)), np.pad(X, ((0, 0), (0, 0), (0, 0), (2, 1)))),
}


@case("layers: a transposed convolution equals its definition, weights (in, out / groups, height, width)")
def transposed(bench: Bench) -> None:
    """Each input entry adds its filter to the output; groups, stride, padding, output padding."""
    for inputs, outputs, groups, stride, padding, extra in (
        (4, 4, 1, 1, 0, 0),
        (3, 4, 1, 2, 1, 1),
        (4, 6, 2, 2, 0, 0),
        (4, 4, 4, 2, 1, 0),
    ):
        layer = bench.backend.nn.ConvTranspose2d(
            inputs, outputs, 3, stride=stride, padding=padding, output_padding=extra, groups=groups
        )
        weight, bias = random(inputs, outputs // groups, 3, 3, seed=1), random(outputs, seed=2)
        model = _with(bench, layer, {"weight": weight, "bias": bias})
        x = random(2, inputs, 4, 5, seed=3)
        expected = _conv_transpose(x, weight, stride, groups)
        rows, columns = (expected.shape[axis] - padding + extra for axis in (2, 3))
        expected = np.pad(expected, ((0, 0), (0, 0), (0, extra), (0, extra)))[:, :, padding:rows, padding:columns]
        found = output(bench, model, x)
        require(found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}")
        within(f"groups={groups}, stride={stride}", relative(found, expected + bias[:, None, None]), "operation")
        stored = bench.backend.read(model)["weight"]
        require(np.array_equal(stored, weight), "read gives other weights than written")


@case("layers: LayerNorm and GroupNorm equal their formulas")
def normalisations(bench: Bench) -> None:
    """(x - mean) / sqrt(var + 1e-5) * weight + bias, over the last axis, and over each group of channels."""
    nn = bench.backend.nn
    arrays = {"weight": random(6, seed=1), "bias": random(6, seed=2)}
    weight, bias = (array.astype(np.float64) for array in arrays.values())
    x = random(2, 5, 6, seed=3) * 3 + 1
    model = _with(bench, nn.LayerNorm(6), arrays)
    within("LayerNorm", relative(output(bench, model, x), _normal(x, (2,)) * weight + bias), "operation")
    x = random(2, 6, 4, 4, seed=4) * 3 + 1
    model = _with(bench, nn.GroupNorm(3, 6), arrays)
    expected = _normal(x.reshape(2, 3, 2, 4, 4), (2, 3, 4)).reshape(x.shape)
    expected = expected * weight[:, None, None] + bias[:, None, None]
    within("GroupNorm", relative(output(bench, model, x), expected), "operation")


@case("layers: activations and functions equal NumPy's")
def functions(bench: Bench) -> None:
    """Each by its name, shape and values; a parameter keeps its array in float32."""
    nn, ops = bench.backend.nn, bench.backend.ops
    anchor = bench.backend.place(nn.Linear(2, 2), bench.device)
    for name, (build, expected) in _ACTIVATIONS.items():
        model = bench.backend.place(nn.Sequential(build(nn), nn.Identity()), bench.device)
        within(name, relative(output(bench, model, X.astype(np.float32)), expected), "operation")
    for name, (compute, expected) in _FUNCTIONS.items():
        found = ops.numpy(compute(nn, bench.backend.tensor(anchor, X.astype(np.float32))))
        require(found.shape == expected.shape, f"{name}: shape {found.shape}, expected {expected.shape}")
        within(name, relative(found, expected), "operation")
    found = ops.numpy(nn.parameter(X))
    require(found.dtype == np.float32 and np.array_equal(found, X.astype(np.float32)), "parameter changed its array")


def _with(bench: Bench, layer: Model, arrays: dict[str, Array]) -> Model:
    return bench.backend.write(bench.backend.place(layer, bench.device), arrays)


def _conv_transpose(x: Array, weight: Array, stride: int, groups: int) -> Array:
    """By the definition: (N, I, H, W), (I, O/groups, 3, 3) -> (N, O, stride * (H - 1) + 3, ...), float64."""
    n, inputs, height, width = x.shape
    outputs = weight.shape[1]
    result = np.zeros((n, outputs * groups, stride * (height - 1) + 3, stride * (width - 1) + 3))
    for i, (row, column) in ((i, place) for i in range(inputs) for place in np.ndindex(height, width)):
        first = i // (inputs // groups) * outputs
        top, left = row * stride, column * stride
        product = x[:, i, row, column].astype(np.float64)[:, None, None, None] * weight[i].astype(np.float64)
        result[:, first : first + outputs, top : top + 3, left : left + 3] += product
    return result


def _normal(x: Array, axes: tuple[int, ...]) -> Array:
    exact = x.astype(np.float64)
    centred = exact - exact.mean(axes, keepdims=True)
    return np.asarray(centred / np.sqrt(exact.var(axes, keepdims=True) + 1e-5))
