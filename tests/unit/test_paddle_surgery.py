"""Held zeros, parameters in a loss, and surgery on transposed convolutions, group norms and attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.decisions import PruneDecision  # noqa: E402
from slimbridge.errors import ModelError  # noqa: E402
from slimbridge.parity import tolerance  # noqa: E402
from slimbridge.parity.measure import relative  # noqa: E402
from slimbridge.ports import OptimizerSettings, Pass  # noqa: E402

nn = paddle.nn
F = paddle.nn.functional
BACKEND = slimbridge_paddle.create()
SAME = tolerance("removal").value
SETTINGS = [OptimizerSettings("sgd"), OptimizerSettings("sgd", momentum=0.0), OptimizerSettings("adamw")]


class Tiny(nn.Layer):
    """conv -> linear, for 3x2x2 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 1)
        self.fc = nn.Linear(16, 2)

    def forward(self, x: Any) -> Any:
        return self.fc(F.relu(self.conv(x)).flatten(1))


def images(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def decision(model: Any, kept: dict[str, dict[int, tuple[int, ...]]], **more: Any) -> PruneDecision:
    arrays = BACKEND.read(model)
    sizes = {name: arrays[name].shape for name in kept}
    return PruneDecision(importance="l1_norm", pruning_ratio=0.5, groups=(), kept=kept, sizes=sizes, **more)


def square(done: Pass) -> dict[str, Any]:
    return {"square": (done.output * done.output).sum()}


def masks_of(model: Any, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {name: array.shape for name, array in BACKEND.read(model).items() if array.ndim > 1}
    return {name: rng.random(shape) < 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=["momentum", "plain", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_held_zeros_stay_zero_and_the_rest_is_trained_as_ever(settings: OptimizerSettings, dtype: Any) -> None:
    model = BACKEND.place(Tiny(), "cpu", dtype)
    plain = BACKEND.clone(model)
    tensor = model.conv.weight
    masks = masks_of(model)
    optimizers = [BACKEND.make_optimizer(each, settings) for each in (model, plain)]
    optimizers[0].hold_zeros(masks)
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        optimizer.set_lr(0.01)
        BACKEND.train_step(each, optimizer, [images(2, 3, 2, 2)], square)
    held, free = BACKEND.read(model), BACKEND.read(plain)
    for name, array in held.items():
        expected = np.where(masks[name], free[name], 0) if name in masks else free[name]
        assert array.dtype == dtype and np.array_equal(array, expected)
    assert model.conv.weight is tensor and not tensor.stop_gradient


def test_held_zeros_are_lifted_and_replaced() -> None:
    model = Tiny()
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings("sgd"))
    optimizer.set_lr(0.01)
    nothing = {"conv.weight": np.zeros((4, 3, 1, 1), bool)}
    for masks, zeros in ((nothing, 12), ({"fc.weight": np.ones((2, 16), bool)}, 0), ({}, 0)):
        optimizer.hold_zeros(masks)
        BACKEND.train_step(model, optimizer, [images(2, 3, 2, 2)], square)
        assert int((BACKEND.read(model)["conv.weight"] == 0).sum()) == zeros


def test_held_zeros_that_do_not_fit_are_named() -> None:
    optimizer = BACKEND.make_optimizer(Tiny(), OptimizerSettings("sgd"))
    with pytest.raises(ModelError, match=r"no parameter 'conv.wight' \(did you mean 'conv.weight'"):
        optimizer.hold_zeros({"conv.wight": np.ones(1, bool)})
    with pytest.raises(ModelError, match=r"'fc.weight' has shape \(2, 16\), its mask \(16, 2\)"):
        optimizer.hold_zeros({"fc.weight": np.ones((16, 2), bool)})


def test_masks_shrink_with_the_channels() -> None:
    model = Tiny()
    masks = masks_of(model)
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings("sgd"))
    optimizer.hold_zeros(masks)
    optimizer.set_lr(0.01)
    columns = tuple(range(4, 8)) + tuple(range(12, 16))
    kept = {"conv.weight": {0: (1, 3)}, "conv.bias": {0: (1, 3)}, "fc.weight": {1: columns}}
    BACKEND.remove_channels(model, decision(model, kept), optimizer)
    BACKEND.train_step(model, optimizer, [images(2, 3, 2, 2)], square)
    arrays = BACKEND.read(model)
    assert np.array_equal(arrays["conv.weight"] != 0, masks["conv.weight"][[1, 3]])
    assert np.array_equal(arrays["fc.weight"] != 0, masks["fc.weight"][:, columns])


def test_a_mask_that_was_not_cut_is_noticed() -> None:
    model = Tiny()
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings("sgd", momentum=0.0))
    optimizer.hold_zeros(masks_of(model))
    optimizer.set_lr(0.01)
    BACKEND.remove_channels(model, decision(model, {"fc.weight": {0: (0,)}, "fc.bias": {0: (0,)}}))
    with pytest.raises(ModelError, match=r"'fc.weight/mask' has shape \[16, 2\], its parameter \[16, 1\]"):
        BACKEND.train_step(model, optimizer, [images(2, 3, 2, 2)], square)


def test_parameters_of_a_pass_are_canonical_and_differentiable() -> None:
    """The loss sum(c * W) has the gradient c, Linear's transposition included."""
    model = nn.Sequential(nn.Conv2D(3, 4, 1), nn.BatchNorm2D(4), nn.Flatten(), nn.Linear(16, 2))
    factors = images(2, 16)
    seen: dict[str, Any] = {}

    def loss(done: Pass) -> dict[str, Any]:
        seen.update({name: tuple(tensor.shape) for name, tensor in done.parameters.items()})
        return {"sum": (done.parameters["3.weight"] * paddle.to_tensor(factors)).sum()}

    found = BACKEND.gradients(model, [images(2, 3, 2, 2)], loss)
    assert np.array_equal(found["3.weight"], factors) and not found["0.weight"].any()
    arrays = BACKEND.read(model)
    statistics = [name for name in arrays if name.startswith("1.running")]
    assert len(statistics) == 2
    assert seen == {name: array.shape for name, array in arrays.items() if name not in statistics}
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings("sgd", momentum=0.0))
    optimizer.set_lr(1.0)
    BACKEND.train_step(model, optimizer, [images(2, 3, 2, 2)], loss)
    assert np.array_equal(BACKEND.read(model)["3.weight"], arrays["3.weight"] - factors)
    assert len(BACKEND.forward(model, [images(2, 3, 2, 2)]).parameters) == 6


def zeroed(model: Any, names: Any, axis: int, gone: Any) -> Any:
    """A copy with entries of an axis set to zero."""
    arrays = BACKEND.read(model)
    for name in names:
        index = [slice(None)] * arrays[name].ndim
        index[axis] = gone
        arrays[name][tuple(index)] = 0
    return BACKEND.write(BACKEND.clone(model), arrays)


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_and_inputs_of_a_transposed_convolution(groups: int) -> None:
    """Axis 1 of its weight holds the outputs of one group, axis 0 the inputs of all."""
    model = nn.Sequential(nn.Conv2D(3, 8, 1), nn.Conv2DTranspose(8, 6, 3, stride=2, groups=groups), nn.Conv2D(6, 2, 1))
    x = images(1, 3, 4, 4)
    per_group = 6 // groups
    left = tuple(range(per_group - 1))
    stays = tuple(group * per_group + i for group in range(groups) for i in left)
    gone = [i for i in range(6) if i not in stays]
    inputs = (0, 1, 2, 4, 5, 6)
    kept = {
        "0.weight": {0: inputs}, "0.bias": {0: inputs}, "1.weight": {0: inputs, 1: left}, "1.bias": {0: stays},
        "2.weight": {1: stays},
    }  # fmt: skip
    expected = zeroed(zeroed(model, ["2.weight"], 1, gone), ["0.weight", "0.bias"], 0, [3, 7])
    BACKEND.remove_channels(model, decision(model, kept))
    up = model[1]
    assert (up._in_channels, up._out_channels, up._groups) == (6, 6 - groups, groups)
    outputs = [BACKEND.forward(each, [x]).output.numpy() for each in (model, expected)]
    assert relative(*outputs) < SAME
    assert not BACKEND.trace(model, [x]).unknown_ops()


def test_depthwise_transposed_convolution() -> None:
    model = nn.Sequential(nn.Conv2D(3, 4, 1), nn.Conv2DTranspose(4, 4, 3, groups=4), nn.Conv2D(4, 2, 1))
    x = images(1, 3, 4, 4)
    expected = zeroed(model, ["2.weight"], 1, [1, 2])
    first = {name: {0: (0, 3)} for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    BACKEND.remove_channels(model, decision(model, {**first, "2.weight": {1: (0, 3)}}))
    assert (model[1]._in_channels, model[1]._out_channels, model[1]._groups) == (2, 2, 2)
    outputs = [BACKEND.forward(each, [x]).output.numpy() for each in (model, expected)]
    assert relative(*outputs) < SAME


def test_a_group_norm_loses_whole_groups() -> None:
    model = nn.Sequential(nn.Conv2D(3, 6, 1), nn.GroupNorm(3, 6), nn.Conv2D(6, 2, 1))
    x = images(1, 3, 4, 4)
    expected = zeroed(model, ["2.weight"], 1, [2, 3])
    names = ("0.weight", "0.bias", "1.weight", "1.bias")

    def kept(stays: tuple[int, ...]) -> PruneDecision:
        return decision(model, {**{name: {0: stays} for name in names}, "2.weight": {1: stays}})

    before = BACKEND.read(model)
    with pytest.raises(ModelError, match="'1' has 6 channels in 3 groups; 5 channels are no whole groups"):
        BACKEND.remove_channels(model, kept((0, 1, 2, 3, 4)))
    assert all(np.array_equal(before[name], array) for name, array in BACKEND.read(model).items())
    BACKEND.remove_channels(model, kept((0, 1, 4, 5)))
    assert (model[1]._num_channels, model[1]._num_groups) == (4, 2)
    outputs = [BACKEND.forward(each, [x]).output.numpy() for each in (model, expected)]
    assert relative(*outputs) < SAME


def test_layer_norm_and_parameters_of_a_layer_itself() -> None:
    class Shifted(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.shift = BACKEND.nn.parameter(np.arange(4.0).reshape(1, 1, 4))
            self.norm = nn.LayerNorm(4)

        def forward(self, x: Any) -> Any:
            return self.norm(self.fc(x) + self.shift)

    model = Shifted()
    stays = (0, 2, 3)
    names = {name: {0: stays} for name in ("fc.weight", "fc.bias", "norm.weight", "norm.bias")}
    BACKEND.remove_channels(model, decision(model, {**names, "shift": {2: stays}}, exact=False))
    assert model.norm._normalized_shape == [3] and model.fc.weight.shape == [3, 3]
    assert BACKEND.read(model)["shift"].tolist() == [[[0.0, 2.0, 3.0]]]
    assert BACKEND.forward(model, [images(1, 5, 3)]).output.shape == [1, 5, 3]
    wide = nn.Sequential(nn.LayerNorm([2, 3]))
    with pytest.raises(ModelError, match="'0' normalises over several axes"):
        BACKEND.remove_channels(wide, decision(wide, {"0.weight": {0: (0, 1)}}))


def test_heads_that_go() -> None:
    """Without its second head, attention gives what it gives when that head's values count for nothing."""
    model = nn.Sequential(nn.MultiHeadAttention(8, 4))
    attention = model[0]
    x = images(2, 5, 8)
    stays, gone = (0, 1, 4, 5, 6, 7), [2, 3]
    expected = zeroed(model, ["0.out_proj.weight"], 1, gone)
    rows = {f"0.{part}_proj.{role}": {0: stays} for part in "qkv" for role in ("weight", "bias")}
    cut = decision(model, {**rows, "0.out_proj.weight": {1: stays}}, heads={"0": (4, 3)})
    BACKEND.remove_channels(model, cut)
    assert (attention.num_heads, attention.head_dim) == (3, 2)
    outputs = [BACKEND.forward(each, [x]).output.numpy() for each in (model, expected)]
    assert relative(*outputs) < SAME


def test_heads_that_cannot_be_told() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].head_dim = model[0].head_width = model[0].d_head = model[0].channels_per_head = 4
    model[0].heads, model[0].headed = 2, True
    with pytest.raises(ModelError, match=r"layer '0' has no attribute for its 4 attention heads.*found heads$"):
        BACKEND.remove_channels(model, decision(model, {"0.weight": {0: (0,)}}, heads={"0": (4, 2)}))
    with pytest.raises(ModelError, match="no layer 'attention'"):
        BACKEND.remove_channels(model, decision(model, {}, heads={"attention": (4, 2)}))
    assert model[0].weight.shape == [3, 4]
    BACKEND.remove_channels(model, decision(model, {}, heads={"0": (2, 1)}))
    assert (model[0].heads, model[0].head_dim, model[0].headed) == (1, 4, True)


def test_outputs_that_do_not_divide_into_groups() -> None:
    model = nn.Sequential(nn.Conv2D(4, 4, 1, groups=2), nn.Conv2D(2, 4, 1, groups=2))
    for name, kept in (("0", (0, 1, 2)), ("1", (0, 1, 2))):
        with pytest.raises(ModelError, match=f"'{name}' would have 3 outputs, which do not divide into its 2 groups"):
            BACKEND.remove_channels(model, decision(model, {f"{name}.weight": {0: kept}}))
