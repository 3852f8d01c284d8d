"""The PyTorch backend: weights, passes, steps and surgery."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from slimbridge.decisions import PruneDecision
from slimbridge.errors import BackendError, ModelError
from slimbridge.parity import tolerance
from slimbridge.ports import Backend, Optimizer, OptimizerSettings, Pass
from slimbridge_torch import create

PRECISE = tolerance("operation_float64").value
STEPPED = tolerance("finite_difference").value
SUMMED = tolerance("gradient_float64").value

BACKEND = create()
RNG = np.random.default_rng(7)


class Block(nn.Module):
    """conv - bn - relu - depthwise - bn - flatten - linear, small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 16, 4)

    def forward(self, x: Any) -> Any:
        return self.fc(self.drop(self.deep(torch.relu(self.bn(self.conv(x))))).flatten(1))


def block(seed: int = 0, dropout: bool = False) -> Block:
    torch.manual_seed(seed)
    model = Block().double()
    model.drop.p = 0.5 if dropout else 0.0
    with torch.no_grad():
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
        model.bn.bias.uniform_(-1, 1)
    return model


def images(count: int = 5) -> np.ndarray[Any, Any]:
    return RNG.normal(size=(count, 3, 4, 4))


def squared(done: Pass) -> dict[str, Any]:
    return {"loss": (done.output**2).mean()}


def kept_channels(keep: tuple[int, ...] = (0, 2, 5)) -> PruneDecision:
    channel = {0: keep}
    columns = tuple(c * 16 + i for c in keep for i in range(16))
    kept = {
        "conv.weight": channel, "conv.bias": channel, "bn.weight": channel, "bn.bias": channel,
        "bn.running_mean": channel, "bn.running_var": channel, "deep.weight": channel, "deep.bias": channel,
        "fc.weight": {1: columns},
    }  # fmt: skip
    sizes = {name: array.shape for name, array in BACKEND.read(block()).items() if name in kept}
    return PruneDecision(importance="l1", pruning_ratio=0.5, groups=(), kept=kept, sizes=sizes)


def test_it_is_a_backend_and_knows_its_models() -> None:
    assert isinstance(BACKEND, Backend)
    assert isinstance(BACKEND.make_optimizer(block(), OptimizerSettings()), Optimizer)
    assert BACKEND.owns(nn.ReLU())
    assert not BACKEND.owns("model")
    found = BACKEND.capabilities()
    assert found.versions["torch"] == torch.__version__
    assert found.devices[0] == "cpu"
    assert ("gpu" in found.devices) == torch.cuda.is_available()


# Weights


def test_read_gives_copies_under_state_dict_names() -> None:
    model = block()
    arrays = BACKEND.read(model)
    assert set(arrays) == {name for name in model.state_dict() if "num_batches" not in name}
    arrays["conv.weight"][:] = 0
    assert model.conv.weight.abs().min() > 0


def test_write_sets_in_place_and_round_trips() -> None:
    model, other = block(0), block(1)
    weight = model.conv.weight
    assert BACKEND.write(model, BACKEND.read(other)) is model
    assert model.conv.weight is weight
    x = images()
    np.testing.assert_array_equal(
        BACKEND.forward(model, [x]).output.numpy(), BACKEND.forward(other, [x]).output.numpy()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.wieght": np.zeros(1)}, r"no parameter or buffer 'conv.wieght' \(did you mean 'conv.weight'\?\)"),
        ({"conv.bias": np.zeros(5)}, r"'conv.bias' has shape \(6,\), the array has \(5,\)"),
        ({"fc.bias": None}, "1 of the model's tensors were not given, 'fc.bias' first"),
    ],
)
def test_write_refuses_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    model = block(0)
    before = BACKEND.read(model)
    arrays = {**BACKEND.read(block(1)), **change}
    with pytest.raises(ModelError, match=message):
        BACKEND.write(model, {name: array for name, array in arrays.items() if array is not None})
    assert all(np.array_equal(array, before[name]) for name, array in BACKEND.read(model).items())


def test_tied_weights_have_one_name_and_take_either() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(BACKEND.read(model)) == ["0.weight"]
    BACKEND.write(model, {"1.weight": np.eye(2, dtype=np.float32)})
    np.testing.assert_array_equal(BACKEND.read(model)["0.weight"], np.eye(2))
    with pytest.raises(ModelError, match="one tied tensor"):
        BACKEND.write(model, {"0.weight": np.eye(2), "1.weight": np.zeros((2, 2))})


def test_layers_name_kinds_and_roles() -> None:
    found = {layer.path: layer for layer in BACKEND.layers(block())}
    assert [(path, layer.kind) for path, layer in found.items()] == [
        ("conv", "conv"), ("bn", "batch_norm"), ("deep", "conv"), ("fc", "linear")
    ]  # fmt: skip
    assert found["bn"].params["running_var"] == "bn.running_var"
    assert BACKEND.module_paths(block()) == ("conv", "bn", "deep", "drop", "fc")


# Passes


def test_tensor_takes_the_models_dtype_and_owns_its_memory() -> None:
    array = np.ones((2, 3), np.float32)
    made = BACKEND.tensor(block(), array)
    made.zero_()
    assert made.dtype == torch.float64
    assert array.sum() == 6
    assert BACKEND.tensor(block(), np.ones(2, np.uint8)).dtype == torch.int64
    with pytest.raises(ModelError, match="dtype complex128 is not allowed"):
        BACKEND.tensor(block(), np.ones(2, complex))


def test_forward_captures_and_restores_each_mode() -> None:
    model = block(dropout=True)
    model.bn.eval()
    x = images()
    done = BACKEND.forward(model, [x], capture=["conv", "bn"])
    expected = functional.conv2d(torch.tensor(x), model.conv.weight, model.conv.bias, padding=1)
    torch.testing.assert_close(done.features["conv"], expected.detach())
    assert list(done.features) == ["conv", "bn"]
    assert not done.output.requires_grad
    assert (model.training, model.bn.training, model.drop.training) == (True, False, True)
    assert not model.conv._forward_hooks


def test_forward_takes_the_first_tensor_of_a_tuple() -> None:
    model = nn.LSTM(3, 2)
    done = BACKEND.forward(model, [np.zeros((4, 1, 3))], capture=[""])
    assert done.features[""].shape == (4, 1, 2)


def test_capture_refuses_unknown_and_silent_layers() -> None:
    model = block()
    with pytest.raises(ModelError, match=r"no layer 'cnov' \(did you mean 'conv'\?\)"):
        BACKEND.forward(model, [images()], capture=["cnov"])
    model.spare = nn.ReLU()
    with pytest.raises(ModelError, match="layer 'spare' did not run"):
        BACKEND.forward(model, [images()], capture=["spare"])
    assert model.training


def test_gradients_match_differences_and_leave_the_model_alone() -> None:
    model, x = block(), images()
    model.spare = nn.Linear(1, 1).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = BACKEND.gradients(model, [x], squared)
    step = 1e-6
    for name in ("conv.weight", "bn.bias", "fc.weight"):
        losses = []
        for sign in (1, -1):
            arrays = BACKEND.read(model)
            arrays[name].flat[3] += sign * step
            output = BACKEND.forward(BACKEND.write(BACKEND.clone(model), arrays), [x]).output
            losses.append(float((output**2).mean()))
        assert found[name].flat[3] == pytest.approx(
            (losses[0] - losses[1]) / (2 * step),
            rel=STEPPED,
            abs=SUMMED,
        )
    assert not found["spare.weight"].any()
    assert set(found) == {name for name, _ in model.named_parameters()}
    BACKEND.gradients(model, [x], squared, train=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_gradients_use_batch_statistics() -> None:
    model, x = block(), images()
    reference = copy.deepcopy(model).train()
    squared(Pass(reference(torch.tensor(x)), {}))["loss"].backward()
    np.testing.assert_allclose(
        BACKEND.gradients(model, [x], squared, train=True)["conv.weight"], reference.conv.weight.grad.numpy()
    )


# Steps


def sgd(w: Any, g: Any, s: dict[str, Any], o: OptimizerSettings) -> Any:
    g = g + o.weight_decay * w
    s["v"] = o.momentum * s.get("v", 0) + g
    return w - 0.1 * (g + o.momentum * s["v"] if o.nesterov else s["v"])


def adam(w: Any, g: Any, s: dict[str, Any], o: OptimizerSettings) -> Any:
    if o.kind == "adam":
        g = g + o.weight_decay * w
    else:
        w = w * (1 - 0.1 * o.weight_decay)
    s["t"] = s.get("t", 0) + 1
    s["m"] = o.betas[0] * s.get("m", 0) + (1 - o.betas[0]) * g
    s["v"] = o.betas[1] * s.get("v", 0) + (1 - o.betas[1]) * g * g
    m, v = s["m"] / (1 - o.betas[0] ** s["t"]), s["v"] / (1 - o.betas[1] ** s["t"])
    return w - 0.1 * m / (np.sqrt(v) + o.eps)


SETTINGS = [
    OptimizerSettings(weight_decay=0.01),
    OptimizerSettings(momentum=0.8, nesterov=True),
    OptimizerSettings(momentum=0.0),
    OptimizerSettings(kind="adam", weight_decay=0.01),
    OptimizerSettings(kind="adamw", weight_decay=0.1),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_steps_match_the_published_formulas(settings: OptimizerSettings) -> None:
    x, target = RNG.normal(size=(8, 3)), RNG.normal(size=(8, 2))
    model = nn.Linear(3, 2, bias=False).double()
    weight = BACKEND.read(model)["weight"]
    optimizer = BACKEND.make_optimizer(model, settings)
    optimizer.set_lr(0.1)
    slots: dict[str, Any] = {}
    for _ in range(4):
        terms = BACKEND.train_step(
            model, optimizer, [x], lambda p: {"mse": ((p.output - torch.tensor(target)) ** 2).mean()}
        )
        residual = x @ weight.T - target
        assert terms["mse"] == pytest.approx((residual**2).mean(), rel=PRECISE)
        gradient = 2 * residual.T @ x / residual.size
        weight = (sgd if settings.kind == "sgd" else adam)(weight, gradient, slots, settings)
    np.testing.assert_allclose(BACKEND.read(model)["weight"], weight, rtol=SUMMED)


@pytest.mark.parametrize("settings", SETTINGS)
def test_optimizer_state_continues_exactly(settings: OptimizerSettings) -> None:
    batches = [images() for _ in range(5)]
    model = block()
    optimizer = BACKEND.make_optimizer(model, settings)
    fresh = BACKEND.make_optimizer(BACKEND.clone(model), settings)
    fresh.load_state(optimizer.state())
    optimizer.set_lr(0.01)
    for x in batches[:3]:
        BACKEND.train_step(model, optimizer, [x], squared)
    other = BACKEND.clone(model)
    resumed = BACKEND.make_optimizer(other, settings)
    resumed.load_state(optimizer.state())
    resumed.set_lr(0.01)
    for x in batches[3:]:
        BACKEND.train_step(model, optimizer, [x], squared)
        BACKEND.train_step(other, resumed, [x], squared)
    arrays = BACKEND.read(other)
    assert all(np.array_equal(array, arrays[name]) for name, array in BACKEND.read(model).items())
    state = resumed.state()
    assert all(np.array_equal(array, state[key]) for key, array in optimizer.state().items())


def test_optimizer_state_names_and_errors() -> None:
    model = nn.Linear(2, 3)
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings(kind="adam"))
    state = optimizer.state()
    assert list(state) == [f"{n}/{s}" for n in ("weight", "bias") for s in ("moment1", "moment2", "step")]
    assert state["weight/step"].shape == ()
    with pytest.raises(ModelError, match=r"unknown slot 'weight/moment3' \(did you mean 'weight/moment"):
        optimizer.load_state({**state, "weight/moment3": np.zeros(1)})
    with pytest.raises(ModelError, match=r"'bias/moment1' has shape \(2,\), \(3,\) is needed"):
        optimizer.load_state({**state, "bias/moment1": np.zeros(2)})
    with pytest.raises(ModelError, match="5 slots were not given, 'weight/moment2' first"):
        optimizer.load_state({"weight/moment1": state["weight/moment1"]})
    with pytest.raises(BackendError, match="set_lr must be called"):
        BACKEND.train_step(model, optimizer, [np.ones((1, 2))], squared)


def test_optimizer_settings_are_checked() -> None:
    with pytest.raises(BackendError, match="nesterov needs a momentum"):
        BACKEND.make_optimizer(block(), OptimizerSettings(momentum=0.0, nesterov=True))
    with pytest.raises(BackendError, match="unknown kind 'rmsprop'; allowed: sgd, adam, adamw"):
        BACKEND.make_optimizer(block(), OptimizerSettings(kind="rmsprop"))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no trainable parameter"):
        BACKEND.make_optimizer(nn.ReLU(), OptimizerSettings())


def test_frozen_parameters_stay() -> None:
    model = block()
    model.conv.weight.requires_grad_(False)
    before = BACKEND.read(model)
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    BACKEND.train_step(model, optimizer, [images()], squared)
    after = BACKEND.read(model)
    assert np.array_equal(after["conv.weight"], before["conv.weight"])
    assert not np.array_equal(after["conv.bias"], before["conv.bias"])
    assert "conv.weight/velocity" not in optimizer.state()


def test_a_loss_that_is_not_finite_takes_no_step() -> None:
    model = block()
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    before = BACKEND.read(model)["fc.weight"]
    with pytest.raises(ModelError, match=r"not finite before the step: 'kd' = inf$"):
        BACKEND.train_step(
            model, optimizer, [images()], lambda p: {"task": p.output.mean(), "kd": p.output.mean() + torch.inf}
        )
    np.testing.assert_array_equal(BACKEND.read(model)["fc.weight"], before)
    for loss, message in (
        (lambda p: {}, "no terms"),
        (lambda p: {"a": p.output}, r"term 'a' must be a scalar tensor, found \(5, 4\)"),
        (lambda p: {"a": p.output.mean().detach()}, "does not depend on any trainable parameter"),
    ):
        with pytest.raises(ModelError, match=message):
            BACKEND.train_step(model, optimizer, [images()], loss)


# Surgery


def zeroed(model: Block, removed: tuple[int, ...]) -> Block:
    """A copy whose removed channels carry nothing, statistics left as they are."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model.conv, model.bn, model.deep):
            layer.weight[list(removed)] = 0
            layer.bias[list(removed)] = 0
        model.fc.weight.view(4, 6, 16)[:, list(removed)] = 0
    return model


def test_removing_channels_equals_zeroing_them() -> None:
    model, x = block(), images()
    expected = BACKEND.forward(zeroed(model, (1, 3, 4)), [x]).output
    assert BACKEND.remove_channels(model, kept_channels()) is model
    torch.testing.assert_close(
        BACKEND.forward(model, [x]).output,
        expected,
        rtol=PRECISE,
        atol=PRECISE,
    )
    assert (model.conv.out_channels, model.bn.num_features, model.fc.in_features) == (3, 3, 48)
    assert (model.deep.in_channels, model.deep.out_channels, model.deep.groups) == (3, 3, 3)
    assert BACKEND.trace(model, [x]).parameters["deep.weight"] == (3, 1, 3, 3)
    restored = BACKEND.write(BACKEND.clone(model), BACKEND.read(model))
    torch.testing.assert_close(
        BACKEND.forward(restored, [x]).output,
        expected,
        rtol=PRECISE,
        atol=PRECISE,
    )


def test_training_goes_on_after_removal_while_an_old_loss_is_alive() -> None:
    model, x = block(), images()
    parameter = model.conv.weight
    old = (model(torch.tensor(x)) ** 2).mean()
    BACKEND.remove_channels(model, kept_channels())
    assert model.conv.weight is parameter
    found = BACKEND.gradients(model, [x], squared)
    assert found["conv.weight"].shape == (3, 3, 3, 3)
    assert torch.isfinite(old)


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3]])
def test_the_optimizer_continues_as_if_sliced_by_hand(settings: OptimizerSettings) -> None:
    model, batches = block(), [images() for _ in range(4)]
    optimizer = BACKEND.make_optimizer(model, settings)
    optimizer.set_lr(0.01)
    for x in batches[:2]:
        BACKEND.train_step(model, optimizer, [x], squared)
    decision = kept_channels()

    other = BACKEND.remove_channels(BACKEND.clone(model), decision)
    by_hand = BACKEND.make_optimizer(other, settings)
    sliced = {}
    for key, array in optimizer.state().items():
        name, slot = key.split("/")
        for axis, kept in decision.kept.get(name, {}).items():
            array = array if slot == "step" else np.take(array, kept, axis)
        sliced[key] = array
    by_hand.load_state(sliced)
    by_hand.set_lr(0.01)

    BACKEND.remove_channels(model, decision, optimizer)
    for x in batches[2:]:
        BACKEND.train_step(model, optimizer, [x], squared)
        BACKEND.train_step(other, by_hand, [x], squared)
    arrays = BACKEND.read(other)
    assert all(np.array_equal(array, arrays[name]) for name, array in BACKEND.read(model).items())


def test_grouped_convolutions_keep_their_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    kept = {"0.weight": {0: (0, 3), 1: (1,)}, "0.bias": {0: (0, 3)}}
    decision = PruneDecision(
        importance="l1", pruning_ratio=0.5, groups=(), kept=kept, sizes={"0.weight": (4, 2, 1, 1), "0.bias": (4,)}
    )
    BACKEND.remove_channels(model, decision)
    assert (model[0].in_channels, model[0].out_channels, model[0].groups) == (2, 2, 2)
    assert BACKEND.forward(model, [np.ones((1, 2, 3, 3))]).output.shape == (1, 2, 3, 3)


def test_depthwise_multipliers_keep_their_ratio() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1, groups=3))
    sizes = {"0.weight": (6, 1, 1, 1), "0.bias": (6,)}
    for kept, ok in (((0, 1, 4, 5), True), ((0, 1, 4), False)):
        decision = PruneDecision(
            importance="l1", pruning_ratio=0.5, groups=(), sizes=sizes,
            kept={"0.weight": {0: kept}, "0.bias": {0: kept}},
        )  # fmt: skip
        if ok:
            pruned = BACKEND.remove_channels(BACKEND.clone(model), decision)
            assert (pruned[0].in_channels, pruned[0].out_channels, pruned[0].groups) == (2, 4, 2)
        else:
            with pytest.raises(ModelError, match="'0' would keep 3 outputs, not a multiple of 2"):
                BACKEND.remove_channels(model, decision)
            assert model[0].weight.shape == (6, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "axes", "size", "message"),
    [
        ("conv.wait", {0: (0,)}, (6,), r"no parameter or buffer 'conv.wait' \(did you mean"),
        ("fc.bias", {0: (0,)}, (7,), r"'fc.bias' has shape \(4,\), the decision was made for \(7,\)"),
        ("fc.bias", {1: (0,)}, (4,), "'fc.bias' has 1 axes, the decision names axis 1"),
        ("fc.bias", {0: ()}, (4,), r"'fc.bias' axis 0: kept indices must be ascending, at least one, in 0..3"),
        ("fc.bias", {0: (0, 4)}, (4,), "in 0..3"),
        ("fc.bias", {0: (2, 1)}, (4,), "must be ascending"),
    ],
)
def test_removal_refuses_what_does_not_fit(name: str, axes: Any, size: Any, message: str) -> None:
    model = block()
    decision = kept_channels()
    kept, sizes = {**decision.kept, name: axes}, {**decision.sizes, name: size}
    broken = decision.model_copy(update={"kept": kept, "sizes": sizes})
    with pytest.raises(ModelError, match=message):
        BACKEND.remove_channels(model, broken)
    assert model.conv.weight.shape[0] == model.conv.out_channels == 6


def test_removal_refuses_another_models_optimizer() -> None:
    model = block()
    with pytest.raises(ModelError, match="of another model"):
        BACKEND.remove_channels(model, kept_channels(), BACKEND.make_optimizer(block(), OptimizerSettings()))
    assert model.conv.out_channels == 6


# The rest of the port


def test_seed_repeats_dropout() -> None:
    outputs = []
    for _ in range(2):
        BACKEND.seed(3)
        outputs.append(torch.rand(4))
    assert torch.equal(*outputs)


def test_place_changes_the_type_and_keeps_the_parameters() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    assert BACKEND.place(model, "cpu", "float64").weight is weight
    assert weight.dtype == torch.float64
    with pytest.raises(BackendError, match="device 'tpu' is not there; this machine has: cpu"):
        BACKEND.place(model, "tpu")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="dtype 'int8' is unknown; allowed: float32, float64"):
        BACKEND.place(model, "cpu", "int8")  # type: ignore[arg-type]


X = RNG.normal(size=(2, 3, 4))
OPS = {
    "sum": (lambda o, x: o.sum(x, (0, 2)), X.sum((0, 2))),
    "sum of all": (lambda o, x: o.sum(x), X.sum()),
    "mean": (lambda o, x: o.mean(x, 1, True), X.mean(1, keepdims=True)),
    "max": (lambda o, x: o.max(x, (1, 2)), X.max((1, 2))),
    "max of all": (lambda o, x: o.max(x, keepdims=True), X.max(keepdims=True)),
    "abs": (lambda o, x: o.abs(x), np.abs(X)),
    "exp": (lambda o, x: o.exp(x), np.exp(X)),
    "log": (lambda o, x: o.log(o.abs(x)), np.log(np.abs(X))),
    "sqrt": (lambda o, x: o.sqrt(o.abs(x)), np.sqrt(np.abs(X))),
    "relu": (lambda o, x: o.relu(x), np.maximum(X, 0)),
    "clip": (lambda o, x: o.clip(x, -0.5, 0.25), np.clip(X, -0.5, 0.25)),
    "round": (lambda o, x: o.round(x * 0 + 2.5), np.full(X.shape, 2.0)),
    "where": (lambda o, x: o.where(x > 0, x, -x), np.abs(X)),
    "softmax": (lambda o, x: o.softmax(x, 1), np.exp(X) / np.exp(X).sum(1, keepdims=True)),
    "log_softmax": (lambda o, x: o.log_softmax(x, -1), X - np.log(np.exp(X).sum(-1, keepdims=True))),
    "reshape": (lambda o, x: o.reshape(x, (3, -1)), X.reshape(3, 8)),
    "transpose": (lambda o, x: o.transpose(x, (2, 0, 1)), X.transpose(2, 0, 1)),
    "concat": (lambda o, x: o.concat([x, x], 1), np.concatenate([X, X], 1)),
}


@pytest.mark.parametrize("name", OPS)
def test_operations_match_numpy(name: str) -> None:
    run, expected = OPS[name]
    np.testing.assert_allclose(BACKEND.ops.numpy(run(BACKEND.ops, torch.tensor(X))), expected, rtol=PRECISE)


def test_one_hot_cast_and_stop_gradient() -> None:
    ops, like = BACKEND.ops, torch.zeros(1, dtype=torch.float64, requires_grad=True)
    hot = ops.one_hot(torch.tensor([[2, 0]]), 3, like)
    np.testing.assert_array_equal(ops.numpy(hot), [[[0, 0, 1], [1, 0, 0]]])
    assert hot.dtype == torch.float64
    assert ops.cast(torch.zeros(1), like).dtype == torch.float64
    assert not ops.stop_gradient(like).requires_grad
    copied = ops.numpy(like)
    copied[:] = 1
    assert like.item() == 0
    assert ops.shape(hot) == (1, 2, 3)


def test_the_layer_names_build_a_model() -> None:
    names = BACKEND.nn
    layers = [
        names.Conv2d(3, 4, 3, stride=1, padding=1, groups=1, bias=False), names.BatchNorm2d(4), names.ReLU(),
        names.ReLU6(), names.MaxPool2d(2, 2, 0), names.AvgPool2d(2), names.AdaptiveAvgPool2d(1), names.Flatten(1),
        names.Dropout(0.1), names.Identity(), names.Linear(4, 2),
    ]  # fmt: skip
    assert BACKEND.forward(names.Sequential(*layers), [np.zeros((2, 3, 8, 8))]).output.shape == (2, 2)
    x = torch.tensor(X)
    left, right = names.split(x, [1, 2], 1)
    assert torch.equal(names.concat([left, right], 1), x)
    assert names.flatten(x, 1).shape == (2, 12)
    assert torch.equal(names.transpose(names.reshape(x, (3, 8)), (1, 0)), x.reshape(3, 8).T)
    assert torch.equal(names.mean(x, [1, 2], True), x.mean((1, 2), keepdim=True))
    assert torch.equal(names.relu(x), x.clamp(min=0))


# Models that are not as usual


class Scaled(nn.Module):
    """A linear layer with a 0-d parameter and a 0-d buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Any) -> Any:
        return self.head(self.fc(x) * self.scale + self.shift)


def test_scalars_round_trip() -> None:
    model, other = Scaled(), Scaled()
    with torch.no_grad():
        model.scale.fill_(3.0)
        model.shift.fill_(-1.0)
    arrays = BACKEND.read(model)
    assert (arrays["scale"].shape, arrays["shift"].shape) == ((), ())
    BACKEND.write(other, arrays)
    assert (other.scale.item(), other.shift.item()) == (3.0, -1.0)
    assert (other.scale.shape, other.shift.shape) == ((), ())
    assert BACKEND.tensor(model, np.array(1.5)).shape == ()


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_scalars_keep_their_optimizer_state_and_survive_removal(kind: Any) -> None:
    settings, x = OptimizerSettings(kind=kind), np.ones((3, 4), np.float32)
    model = Scaled()
    optimizer = BACKEND.make_optimizer(model, settings)
    optimizer.set_lr(0.1)
    BACKEND.train_step(model, optimizer, [x], squared)
    state = optimizer.state()
    slot = "scale/velocity" if kind == "sgd" else "scale/moment1"
    assert state[slot].shape == ()
    assert state[slot] != 0
    copied = BACKEND.clone(model)
    again = BACKEND.make_optimizer(copied, settings)
    again.load_state(state)
    again.set_lr(0.1)
    for each, its in ((model, optimizer), (copied, again)):
        BACKEND.train_step(each, its, [x], squared)
    assert copied.scale.item() == model.scale.item()
    kept = {"fc.weight": {0: (1, 4)}, "fc.bias": {0: (1, 4)}, "head.weight": {1: (1, 4)}}
    sizes = {"fc.weight": (6, 4), "fc.bias": (6,), "head.weight": (2, 6)}
    decision = PruneDecision(importance="l1", pruning_ratio=0.5, groups=(), kept=kept, sizes=sizes)
    BACKEND.remove_channels(model, decision, optimizer)
    BACKEND.train_step(model, optimizer, [x], squared)
    assert optimizer.state()[slot].shape == ()


def expanded() -> Any:
    model = Scaled()
    model.register_buffer("wide", torch.zeros(1).expand(3))
    return model, {"wide": np.ones(3, np.float32)}, "'wide' is an expanded tensor"


def in_inference_mode() -> Any:
    model = Scaled()
    with torch.inference_mode():
        model.register_buffer("fixed", torch.zeros(3))
    return model, {"fixed": np.ones(3, np.float32)}, "'fixed' was made in inference mode"


def without_type(array: np.ndarray[Any, Any], message: str) -> Any:
    return lambda: (Scaled(), {"shift": array}, message)


@pytest.mark.parametrize(
    "case",
    [
        expanded,
        in_inference_mode,
        without_type(np.array("a"), "'shift': dtype <U1 is not allowed"),
        without_type(np.array(None), "'shift': dtype object is not allowed"),
        without_type(np.array(1j), "'shift' is real, the array is complex"),
    ],
)
def test_write_checks_every_array_before_it_changes_one(case: Any) -> None:
    model, change, message = case()
    before = BACKEND.read(model)
    arrays = {**{name: array + 1 for name, array in before.items()}, **change}
    with pytest.raises(ModelError, match=message):
        BACKEND.write(model, arrays)
    after = BACKEND.read(model)
    assert all(np.array_equal(after[name], array) for name, array in before.items())


def test_write_takes_any_memory_layout() -> None:
    model = nn.Linear(3, 2, bias=False)
    values = np.arange(6, dtype=">f4").reshape(3, 2).T[::-1]
    BACKEND.write(model, {"weight": values})
    np.testing.assert_array_equal(model.weight.detach().numpy(), values)


def test_bfloat16_is_read_as_float32_and_written_back() -> None:
    model = nn.Linear(4, 3).bfloat16()
    arrays = BACKEND.read(model)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(arrays["weight"], model.weight.detach().float().numpy())
    other = nn.Linear(4, 3).bfloat16()
    BACKEND.write(other, arrays)
    assert torch.equal(other.weight, model.weight)
    x = np.ones((2, 4), np.float32)
    output = BACKEND.ops.numpy(BACKEND.forward(model, [x]).output)
    assert output.dtype == np.float32
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    BACKEND.train_step(model, optimizer, [x], squared)
    optimizer.load_state(optimizer.state())


def test_half_is_read_as_it_is() -> None:
    assert BACKEND.read(nn.Linear(2, 2).half())["weight"].dtype == np.float16


NORMS = {
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": nn.utils.parametrizations.spectral_norm,
    "spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 1), nn.Linear(3, 4)])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_with_a_computed_weight_is_no_ordinary_one(name: str, layer: nn.Module) -> None:
    model = nn.Sequential(NORMS[name](copy.deepcopy(layer)))
    found = BACKEND.layers(model)
    assert {entry.kind for entry in found} == {"unknown"}
    assert {param for entry in found for param in entry.params.values()} == set(BACKEND.read(model))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_that_cannot_be_copied_says_why() -> None:
    model = nn.Sequential(nn.ReLU(), nn.utils.weight_norm(nn.Conv2d(3, 4, 1)))
    assert [entry.kind for entry in BACKEND.layers(model)] == ["unknown"]
    with pytest.raises(ModelError, match=r"^clone: .*'weight' of layer '1' is a computed tensor [^\n]*weight_norm"):
        BACKEND.clone(model)
    held = nn.ReLU()
    held.lines = (line for line in "ab")
    with pytest.raises(ModelError, match=r"^clone: the model cannot be copied: [^\n]*generator"):
        BACKEND.clone(held)


@pytest.mark.parametrize("method", ["read", "clone", "place"])
@pytest.mark.parametrize("lazy", [True, False])
def test_a_model_without_data_is_refused_in_one_line(method: str, lazy: bool) -> None:
    model = nn.Sequential(nn.LazyLinear(4) if lazy else nn.Linear(3, 4, device="meta"))
    message = "has no shape yet; run the model once first" if lazy else "is on the meta device and has no data"
    with pytest.raises(ModelError, match=rf"^{method}: '0.weight' {message}[^\n]*$"):
        getattr(BACKEND, method)(model)
    with pytest.raises(ModelError, match=f"^write: '0.weight' {message}"):
        BACKEND.write(model, {"0.weight": np.zeros((4, 3), np.float32)})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda done: None, "must return a mapping of names to scalar tensors, found NoneType"),
        (lambda done: done.output.mean(), "must return a mapping of names to scalar tensors, found Tensor"),
        (lambda done: {}, "returned no terms"),
        (lambda done: {"good": done.output.mean(), "bad": 1.0}, "term 'bad' must be a scalar tensor, found float"),
        (lambda done: {"bad": None}, "term 'bad' must be a scalar tensor, found NoneType"),
        (lambda done: {"bad": done.output.mean(1)}, r"term 'bad' must be a scalar tensor, found \(5,\)"),
    ],
)
def test_a_loss_without_scalars_is_refused(loss: Any, message: str) -> None:
    model = block()
    before = BACKEND.read(model)
    optimizer = BACKEND.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    with pytest.raises(ModelError, match=f"^loss: .*{message}"):
        BACKEND.gradients(model, [images()], loss)
    with pytest.raises(ModelError, match=f"^loss: .*{message}"):
        BACKEND.train_step(model, optimizer, [images()], loss)
    after = BACKEND.read(model)
    weights = [name for name in before if "running" not in name]
    assert all(np.array_equal(before[name], after[name]) for name in weights)
