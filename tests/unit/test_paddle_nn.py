"""The layers and functions that a model written once is made of, on Paddle: values by their formulas in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.parity import tolerance  # noqa: E402
from slimbridge.parity.measure import relative  # noqa: E402

PRECISE = tolerance("operation_float64").value
NN = slimbridge_paddle.create().nn
X = np.random.default_rng(0).normal(size=(2, 4, 6, 6)) * 3


def out(compute: Any, x: Any = X) -> Any:
    """The value of a layer or function in float64."""
    if isinstance(compute, paddle.nn.Layer):
        compute.to(dtype="float64")
    return compute(paddle.to_tensor(x)).numpy()


def normalised(x: Any, axes: tuple[int, ...]) -> Any:
    """Mean 0 and variance 1 over axes, with 1e-5 added to the variance."""
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + np.float64(np.float32(1e-5)))


def softmax(x: Any, axis: int) -> Any:
    """Exponentials over their sum."""
    raised = np.exp(x - x.max(axis, keepdims=True))
    return raised / raised.sum(axis, keepdims=True)


GELU = X * 0.5 * (1 + np.vectorize(erf)(X / np.sqrt(2)))
SIGMOID = 1 / (1 + np.exp(-X))
PADDED = np.pad(X, [(0, 0), (0, 0), (1, 2), (0, 3)])
CASES: dict[str, tuple[Callable[[], Any], Any]] = {
    "LeakyReLU": (lambda: NN.LeakyReLU(0.1), np.where(X > 0, X, 0.1 * X)),
    "GELU": (lambda: NN.GELU(), GELU),
    "SiLU": (lambda: NN.SiLU(), X * SIGMOID),
    "Sigmoid": (lambda: NN.Sigmoid(), SIGMOID),
    "Hardswish": (lambda: NN.Hardswish(), X * np.clip(X + 3, 0, 6) / 6),
    "Hardsigmoid": (lambda: NN.Hardsigmoid(), np.clip(X + 3, 0, 6) / 6),
    "LayerNorm": (lambda: NN.LayerNorm(6), normalised(X, (3,))),
    "GroupNorm": (lambda: NN.GroupNorm(2, 4), normalised(X.reshape(2, 2, -1), (2,)).reshape(X.shape)),
    "sigmoid": (lambda: NN.sigmoid, SIGMOID),
    "gelu": (lambda: NN.gelu, GELU),
    "softmax": (lambda: lambda x: NN.softmax(x, 1), softmax(X, 1)),
    "matmul": (lambda: lambda x: NN.matmul(x, x), X @ X),
    "upsample": (lambda: lambda x: NN.upsample(x, 3), X.repeat(3, 2).repeat(3, 3)),
    "pad": (lambda: lambda x: NN.pad(x, [(1, 2), (0, 3)]), PADDED),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    make, expected = CASES[name]
    found = out(make())
    assert found.shape == expected.shape
    assert relative(found, expected) < PRECISE


def test_padding_of_one_axis_and_of_sequences() -> None:
    assert np.array_equal(out(lambda x: NN.pad(x, [(2, 0)]), X[0, 0]), np.pad(X[0, 0], [(0, 0), (2, 0)]))
    assert np.array_equal(out(lambda x: NN.pad(x, [(1, 1), (0, 0)]), X[0]), np.pad(X[0], [(0, 0), (1, 1), (0, 0)]))


def transposed(x: Any, weight: Any, stride: int, padding: int, extra: int) -> Any:
    """Each input entry adds its share of the kernel to the output: one image, weight (in, out, k, k)."""
    size, k = x.shape[-1], weight.shape[-1]
    full = np.zeros((weight.shape[1], *((size - 1) * stride + k + extra,) * 2))
    for row in range(size):
        for column in range(size):
            share = np.tensordot(x[:, row, column], weight, (0, 0))
            full[:, row * stride : row * stride + k, column * stride : column * stride + k] += share
    end = full.shape[-1] - padding
    return full[:, padding:end, padding:end]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_transposed_convolution(groups: int) -> None:
    layer = NN.ConvTranspose2d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=False)
    found = out(layer)
    weight = layer.weight.numpy()
    assert weight.shape == (4, 8 // groups, 3, 3) and layer.bias is None
    for image, result in zip(X, found, strict=True):
        parts = [transposed(part, kernel, 2, 1, 1)
                 for part, kernel in zip(np.split(image, groups), np.split(weight, groups), strict=True)]  # fmt: skip
        assert relative(result, np.concatenate(parts)) < PRECISE


def test_a_parameter_is_trained_and_saved() -> None:
    backend = slimbridge_paddle.create()

    class Scaled(paddle.nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.token = NN.parameter(np.arange(3.0))

        def forward(self, x: Any) -> Any:
            return x * self.token

    model = Scaled()
    assert np.array_equal(backend.read(model)["token"], np.arange(3, dtype=np.float32))
    gradient = backend.gradients(model, [np.ones((1, 3))], lambda done: {"sum": done.output.sum()})
    assert np.array_equal(gradient["token"], np.ones(3))


def test_replacing_the_hard_sigmoid_is_still_needed() -> None:
    x = np.linspace(-2, 2, 9)
    own = paddle.nn.functional.hardsigmoid(paddle.to_tensor(x)).numpy()
    assert relative(own, (x + 3) / 6) > PRECISE
