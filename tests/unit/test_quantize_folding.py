"""BatchNorm folding: which ones go into the layer before them, and that the model computes what it did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slimbridge.decisions import Fold
from slimbridge.parity import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Array, Backend, tensors_in
from slimbridge.quantize.fold import find_folds, fold_weights
from tests.architectures.parts import Part, make, with_weights
from tests.handmade import Made

RNG = np.random.default_rng(3)
X = RNG.standard_normal((2, 3, 6, 6)).astype(np.float32)


def folded(made: Made, *outputs: int) -> list[tuple[str, str]]:
    """The folds of a graph: weight and scale."""
    weights = [layer.params["weight"] for layer in made.layers.values() if layer.kind in ("conv", "linear")]
    return [(fold.weight, fold.scale) for fold in find_folds(made.graph(*outputs), weights)]


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_and_the_norm_after_it(bias: bool) -> None:
    made = Made(1, 3, 6, 6)
    made.norm(made.conv(made.x, "conv", bias=bias), "bn", eps=1e-3)
    (fold,) = find_folds(made.graph(), ["conv.weight"])
    assert fold == Fold(
        weight="conv.weight",
        bias="conv.bias" if bias else None,
        scale="bn.weight",
        shift="bn.bias",
        mean="bn.running_mean",
        variance="bn.running_var",
        eps=1e-3,
    )
    assert find_folds(made.graph(), []) == (), "the layer stays in float"


def test_a_linear_layer_takes_one_in() -> None:
    made = Made(4, 3)
    made.norm(made.linear(made.x, "fc"), "bn")
    assert folded(made) == [("fc.weight", "bn.weight")]


def test_what_is_read_twice_is_not_folded() -> None:
    made = Made(1, 3, 6, 6)
    conv = made.conv(made.x, "conv")
    made.binary(made.norm(conv, "bn"), conv)
    assert folded(made) == []


def test_what_the_model_returns_too_is_not_folded() -> None:
    made = Made(1, 3, 6, 6)
    conv = made.conv(made.x, "conv")
    assert folded(made, made.norm(conv, "bn"), conv) == []


def test_a_norm_that_two_layers_share_is_not_folded() -> None:
    made = Made(1, 3, 6, 6)
    first = made.norm(made.conv(made.x, "a"), "bn")
    second = made.norm(made.conv(first, "b"), "bn")
    made.norm(made.conv(second, "c"), "last")
    assert folded(made) == [("c.weight", "last.weight")]


def test_a_layer_that_runs_twice_takes_none_in() -> None:
    made = Made(1, 4, 6, 6)
    first = made.norm(made.conv(made.x, "a"), "bn1")
    made.norm(made.conv(first, "a"), "bn2")
    assert folded(made) == []


def test_a_weight_that_two_layers_share_takes_none_in() -> None:
    made = Made(1, 4, 6, 6)
    first = made.norm(made.conv(made.x, "a", weight="tied"), "bn1")
    made.norm(made.conv(first, "b", weight="tied"), "bn2")
    assert folded(made) == []


def test_a_norm_without_scale_and_shift_stays() -> None:
    made = Made(1, 3, 6, 6)
    made.norm(made.conv(made.x, "conv"), "bn", affine=False)
    assert folded(made) == []


def test_a_transposed_convolution_takes_none_in() -> None:
    made = Made(1, 3, 6, 6)
    made.norm(made.conv(made.x, "up", transposed=True), "bn")
    assert folded(made) == []


def test_a_norm_behind_something_else_stays() -> None:
    made = Made(1, 3, 6, 6)
    made.norm(made.act(made.conv(made.x, "conv"), "relu"), "bn")
    assert folded(made) == []


FOLD = Fold(weight="w", bias="b", scale="s", shift="t", mean="m", variance="v", eps=1e-3)


def normed(rows: Array, weights: dict[str, Array]) -> Array:
    """Linear layer and BatchNorm in float64, by the definition of each."""
    values = {name: array.astype(np.float64) for name, array in weights.items()}
    y = rows @ values["w"].T + values["b"]
    return (y - values["m"]) / np.sqrt(values["v"] + FOLD.eps) * values["s"] + values["t"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folding_changes_nothing_but_the_place(dtype: str) -> None:
    """A scale of 0 and a negative one included."""
    weights = {name: RNG.standard_normal(5) for name in "bstm"}
    weights |= {"w": RNG.standard_normal((5, 3)), "v": RNG.uniform(0.1, 2, 5)}
    weights["s"][:2] = 0, -2
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    rows = RNG.standard_normal((20, 3))
    changed = fold_weights(weights, (FOLD,))
    assert set(changed) == set(weights)
    assert {array.dtype.name for array in changed.values()} == {dtype}
    row = "forward" if dtype == "float32" else "operation_float64"
    assert relative(normed(rows, changed), normed(rows, weights)) <= tolerance(row).value
    assert not changed["b"].any()
    assert not changed["m"].any()
    assert (changed["s"] == 1).all()
    assert not changed["w"][0].any()
    assert not fold_weights({**weights, "b": weights["b"] * 0}, (FOLD.model_copy(update={"bias": None}),)).keys() & {
        "b"
    }


class Folding(Part):
    """Convolutions with and without a bias, a grouped one, a linear layer; a norm behind each, and one before all."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.first = nn.BatchNorm2d(3)
        self.a, self.na = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6)
        self.act, self.last = nn.ReLU(), nn.Linear(6 * 16, 3)

    def forward(self, x: Any) -> Any:
        x = self.act(self.na(self.a(self.first(x))))
        return self.last(self.nn.flatten(self.nb(self.b(x)), 1))


def test_a_model_gives_the_same_outputs(backend: Backend) -> None:
    model = with_weights(backend, make(backend.nn, Folding))
    turned = backend.read(model)["na.weight"].copy()
    turned[2] *= -1
    backend.write(model, {"na.weight": turned}, partial=True)
    before = backend.ops.numpy(tensors_in(backend.forward(model, [X]).output)[0])
    folds = find_folds(backend.trace(model, [X]), ["a.weight", "b.weight", "last.weight"])
    assert [(fold.weight, fold.bias) for fold in folds] == [("a.weight", "a.bias"), ("b.weight", None)]
    changed = fold_weights(backend.read(model), folds)
    backend.write(model, changed, partial=True)
    after = backend.ops.numpy(tensors_in(backend.forward(model, [X]).output)[0])
    assert relative(after, before) <= tolerance("forward").value
    assert (changed["nb.running_var"] == np.float32(1 - folds[1].eps)).all()


def test_folds_are_equal_on_both_frameworks(torch_backend: Backend, paddle_backend: Backend) -> None:
    found = []
    for side in (torch_backend, paddle_backend):
        model = with_weights(side, make(side.nn, Folding))
        found.append(find_folds(side.trace(model, [X]), ["a.weight", "b.weight"]))
    assert found[0] == found[1]
    assert len(found[0]) == 2
