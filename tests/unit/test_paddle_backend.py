"""The Paddle backend against NumPy: names, modes, optimizers, statistics and surgery."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import pytest

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.decisions import PruneDecision  # noqa: E402
from slimbridge.errors import BackendError, ModelError  # noqa: E402
from slimbridge.parity import tolerance  # noqa: E402
from slimbridge.ports import Backend, OptimizerSettings, Pass  # noqa: E402

PRECISE = tolerance("operation_float64").value
STEPPED = tolerance("finite_difference").value
SINGLE = tolerance("operation").value

nn = paddle.nn
F = paddle.nn.functional


@pytest.fixture(scope="module")
def backend() -> Any:
    return slimbridge_paddle.create()


class Small(nn.Layer):
    """conv -> norm -> relu -> depthwise -> flatten -> linear, for 3x4x4 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2D(6)
        self.dw = nn.Conv2D(6, 6, 3, padding=1, groups=6, bias_attr=False)
        self.fc = nn.Linear(6 * 16, 5)

    def forward(self, x: Any) -> Any:
        return self.fc(self.dw(F.relu(self.bn(self.conv(x)))).flatten(1))


def images(count: int = 4, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, 3, 4, 4))


def small(backend: Any, seed: int = 0) -> Any:
    """A float64 model with drawn weights and positive running variances."""
    model = backend.place(Small(), dtype="float64")
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=array.shape) for name, array in backend.read(model).items()}
    return backend.write(model, {n: np.abs(a) + 0.5 if n.endswith("running_var") else a for n, a in arrays.items()})


def square(done: Pass) -> dict[str, Any]:
    return {"square": (done.output * done.output).mean()}


def test_it_is_a_backend(backend: Any) -> None:
    assert isinstance(backend, Backend) and backend.name == "paddle"
    found = backend.capabilities()
    assert found.versions["paddlepaddle"] == paddle.__version__ and "cpu" in found.devices and found.threads >= 1
    assert backend.owns(Small()) and not backend.owns(np.zeros(1))


def test_names_layout_and_round_trip(backend: Any) -> None:
    model = small(backend)
    arrays = backend.read(model)
    assert list(arrays)[:6] == [
        "conv.weight", "conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var",
    ]  # fmt: skip
    assert np.array_equal(arrays["fc.weight"], model.fc.weight.numpy().T)
    other = backend.write(small(backend, seed=1), arrays)
    assert all(np.array_equal(array, arrays[name]) for name, array in backend.read(other).items())
    arrays["conv.weight"][:] = 0
    assert np.abs(backend.read(model)["conv.weight"]).sum() > 0  # copies


def test_layers_and_paths(backend: Any) -> None:
    model = small(backend)
    found = backend.layers(model)
    assert [(layer.path, layer.kind) for layer in found] == [
        ("conv", "conv"), ("bn", "batch_norm"), ("dw", "conv"), ("fc", "linear"),
    ]  # fmt: skip
    assert found[1].params["running_var"] == "bn.running_var"
    assert backend.module_paths(model) == ("conv", "bn", "dw", "fc")


def test_tied_tensors_have_one_name_and_take_any(backend: Any) -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Linear(4, 4), shared)
    model[1].weight = shared.weight
    assert list(backend.read(model)) == ["0.weight", "0.bias", "1.bias"]
    value = np.arange(16, dtype=np.float32).reshape(4, 4)
    backend.write(model, {"1.weight": value}, partial=True)
    assert np.array_equal(backend.read(model)["0.weight"], value)
    with pytest.raises(ModelError, match="one tied tensor"):
        backend.write(model, {"0.weight": value, "1.weight": value + 1}, partial=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.wieght": np.zeros(1)}, "no parameter or buffer 'conv.wieght' .did you mean 'conv.weight'"),
        ({"conv.weight": np.zeros((6, 3, 3))}, r"'conv.weight' has shape \(6, 3, 3, 3\), the array has"),
        ({"conv.bias": np.array(["a"] * 6)}, "a real number type is needed"),
    ],
)
def test_write_refuses_and_changes_nothing(backend: Any, change: dict[str, Any], message: str) -> None:
    model = small(backend)
    before = backend.read(model)
    with pytest.raises(ModelError, match=message):
        backend.write(model, {"bn.bias": np.zeros(6), **change}, partial=True)
    assert all(np.array_equal(before[name], array) for name, array in backend.read(model).items())
    with pytest.raises(ModelError, match=r"8 parameters are missing: conv.weight, conv.bias"):
        backend.write(model, {"bn.bias": np.zeros(6)})


def test_place_keeps_the_objects(backend: Any) -> None:
    model = Small()
    weight, mean = model.conv.weight, model.bn._mean
    backend.place(model, dtype="float64")
    assert model.conv.weight is weight and model.bn._mean is mean
    assert {array.dtype for array in backend.read(model).values()} == {np.dtype("float64")}
    assert backend.forward(model, [images()]).output.dtype == paddle.float64
    if not paddle.device.is_compiled_with_cuda():
        with pytest.raises(BackendError, match=r"no device 'gpu' here; there is cpu"):
            backend.place(model, "gpu")


def test_tensor_takes_the_models_dtype(backend: Any) -> None:
    model = small(backend)
    assert backend.tensor(model, np.zeros((2, 1), np.float32)).dtype == paddle.float64
    assert backend.tensor(model, np.zeros(2, np.int32)).dtype == paddle.int64
    assert backend.tensor(model, np.float32(3)).shape == []


def test_forward_captures_and_restores_modes(backend: Any) -> None:
    model = small(backend)
    model.train()
    model.bn.eval()
    before = backend.read(model)
    done = backend.forward(model, [images()], capture=("conv", "fc"))
    assert np.array_equal(done.features["fc"].numpy(), done.output.numpy())
    assert tuple(done.features["conv"].shape) == (4, 6, 4, 4) and done.output.stop_gradient
    assert model.training and model.conv.training and not model.bn.training
    assert all(np.array_equal(before[name], array) for name, array in backend.read(model).items())
    with pytest.raises(ModelError, match=r"no layer 'conf'.*did you mean 'conv'"):
        backend.forward(model, [images()], capture=("conf",))
    unused = nn.Sequential(nn.Identity())
    unused[0].extra = nn.Identity()
    with pytest.raises(ModelError, match="did not run"):
        backend.forward(unused, [images()], capture=("0.extra",))


@pytest.mark.parametrize("train", [False, True])
def test_gradients_against_differences(backend: Any, train: bool) -> None:
    model, x = small(backend), images()
    before = backend.read(model)
    found = backend.gradients(model, [x], square, train=train)
    after = backend.read(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert model.conv.weight.grad is None
    assert set(found) == {name for name in before if "running" not in name}
    if train:
        return
    for name, index in (("fc.weight", (2, 7)), ("conv.weight", (1, 2, 0, 1)), ("bn.bias", (3,))):
        values = []
        for shift in (1e-5, -1e-5):
            array = before[name].copy()
            array[index] += shift
            backend.write(model, {name: array}, partial=True)
            values.append(float((backend.forward(model, [x]).output ** 2).mean()))
        backend.write(model, {name: before[name]}, partial=True)
        assert found[name][index] == pytest.approx((values[0] - values[1]) / 2e-5, rel=STEPPED)


def test_clone_is_independent(backend: Any) -> None:
    model = small(backend)
    model.bn.eval()
    copy = backend.clone(model)
    x = images()
    assert np.array_equal(backend.forward(copy, [x]).output.numpy(), backend.forward(model, [x]).output.numpy())
    assert not copy.bn.training and copy.conv.training
    backend.write(copy, {"fc.bias": np.zeros(5)}, partial=True)
    assert np.abs(backend.read(model)["fc.bias"]).sum() > 0


def reference(settings: OptimizerSettings, w: Any, grads: list[Any], lr: float) -> Any:
    """The update rules of PyTorch's documentation (SGD, Adam, AdamW), in float64."""
    velocity, m, v = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    beta1, beta2 = settings.betas
    for t, gradient in enumerate(grads, 1):
        g = gradient(w)
        if settings.kind == "adamw":
            w = w * (1 - lr * settings.weight_decay)
        else:
            g = g + settings.weight_decay * w
        if settings.kind == "sgd":
            velocity = settings.momentum * velocity + g
            w = w - lr * (g + settings.momentum * velocity if settings.nesterov else velocity)
        else:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            w = w - lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + settings.eps)
    return w


SETTINGS = [
    OptimizerSettings(momentum=0.0, weight_decay=0.1),
    OptimizerSettings(momentum=0.9, weight_decay=0.1),
    OptimizerSettings(momentum=0.9, nesterov=True),
    OptimizerSettings(kind="adam", weight_decay=0.1),
    OptimizerSettings(kind="adamw", weight_decay=0.1, betas=(0.8, 0.99), eps=1e-6),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.kind}-{s.momentum}-{s.nesterov}")
def test_optimizers_follow_the_formula(backend: Any, settings: OptimizerSettings) -> None:
    model = backend.place(nn.Linear(3, 2, bias_attr=False), dtype="float64")
    rng = np.random.default_rng(0)
    w, xs = rng.normal(size=(2, 3)), rng.normal(size=(6, 4, 3))
    backend.write(model, {"weight": w})
    optimizer = backend.make_optimizer(model, settings)
    optimizer.set_lr(0.05)
    for x in xs:
        backend.train_step(model, optimizer, [x], square)
    grads = [lambda w, x=x: 2 * (x @ w.T).T @ x / (4 * 2) for x in xs]
    np.testing.assert_allclose(backend.read(model)["weight"], reference(settings, w, grads, 0.05), rtol=PRECISE)


def test_a_parameters_own_regularizer_does_not_count(backend: Any) -> None:
    attr = paddle.ParamAttr(regularizer=paddle.regularizer.L2Decay(0.5), learning_rate=3.0)
    model = backend.place(nn.Linear(3, 2, weight_attr=attr, bias_attr=False), dtype="float64")
    w, x = backend.read(model)["weight"], np.ones((1, 3))
    optimizer = backend.make_optimizer(model, OptimizerSettings(momentum=0.0))
    optimizer.set_lr(0.1)
    backend.train_step(model, optimizer, [x], square)
    np.testing.assert_allclose(backend.read(model)["weight"], w - 0.1 * (x @ w.T).T @ x, rtol=PRECISE)
    assert model.weight.regularizer is not None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("settings", SETTINGS[1:], ids=lambda s: f"{s.kind}-{s.nesterov}")
def test_a_restored_run_goes_on_exactly(backend: Any, settings: OptimizerSettings, dtype: str) -> None:
    model = backend.place(small(backend), dtype=dtype)
    optimizer = backend.make_optimizer(model, settings)
    optimizer.set_lr(0.01)
    empty = optimizer.state()
    assert all(not np.any(value) for value in empty.values())
    for seed in range(3):
        backend.train_step(model, optimizer, [images(seed=seed)], square)
    copy, state = backend.clone(model), optimizer.state()
    assert state[next(key for key in state if key.startswith("fc.weight/"))].shape == (5, 96)
    if settings.kind != "sgd":
        assert int(state["fc.weight/step"]) == 3 and state["fc.weight/step"].shape == ()
    other = backend.make_optimizer(copy, settings)
    other.load_state(state)
    other.set_lr(0.01)
    for seed in range(3, 5):
        backend.train_step(model, optimizer, [images(seed=seed)], square)
        backend.train_step(copy, other, [images(seed=seed)], square)
    ours, theirs = backend.read(model), backend.read(copy)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_state_that_does_not_fit_is_named(backend: Any) -> None:
    model = small(backend)
    optimizer = backend.make_optimizer(model, OptimizerSettings())
    state = optimizer.state()
    with pytest.raises(ModelError, match=r"unknown slot 'conv.weight/velocty'.*did you mean"):
        optimizer.load_state({**state, "conv.weight/velocty": np.zeros(1)})
    with pytest.raises(ModelError, match=r"'conv.bias/velocity' has shape \(3,\), \(6,\) is needed"):
        optimizer.load_state({**state, "conv.bias/velocity": np.zeros(3)})
    with pytest.raises(ModelError, match="7 slots are missing"):
        optimizer.load_state({})
    with pytest.raises(BackendError, match="set_lr"):
        backend.train_step(model, optimizer, [images()], square)


def test_running_statistics_are_unbiased(backend: Any) -> None:
    class Twice(nn.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2D(3)

        def forward(self, x: Any, y: Any) -> Any:
            return self.bn(x).mean() + self.bn(y).mean() + (self.bn.weight * self.bn.weight).sum()

    model = backend.place(Twice(), dtype="float64")
    optimizer = backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.0)
    x, y = images(2, seed=1), images(3, seed=2) * 3 + 1
    mean, variance = np.zeros(3), np.ones(3)
    for _ in range(2):
        backend.train_step(model, optimizer, [x, y], lambda done: {"sum": done.output})
        for batch in (x, y):
            mean = 0.9 * mean + 0.1 * batch.mean((0, 2, 3))
            variance = 0.9 * variance + 0.1 * batch.var((0, 2, 3), ddof=1)
    found = backend.read(model)
    np.testing.assert_allclose(found["bn.running_mean"], mean, rtol=PRECISE)
    np.testing.assert_allclose(found["bn.running_var"], variance, rtol=PRECISE)
    assert not model.bn._forward_pre_hooks and not model.bn._forward_post_hooks


def test_one_value_per_channel_is_refused(backend: Any) -> None:
    model = nn.Sequential(nn.BatchNorm1D(3))
    optimizer = backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    with pytest.raises(ModelError, match="'0': one value per channel"):
        backend.train_step(model, optimizer, [np.ones((1, 3))], square)


def test_train_step_returns_terms_and_refuses_what_is_not_finite(backend: Any) -> None:
    model = small(backend)
    optimizer = backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.01)
    seen = []

    def loss(done: Pass) -> dict[str, Any]:
        seen.append(done.features["conv"].shape)
        return {"a": done.output.mean(), "b": done.features["conv"].abs().mean() * 0.5}

    terms = backend.train_step(model, optimizer, [images()], loss, capture=("conv",))
    assert set(terms) == {"a", "b"} and isinstance(terms["a"], float) and seen == [[4, 6, 4, 4]]
    before = backend.read(model)
    with pytest.raises(ModelError, match="b = inf: not finite"):
        backend.train_step(
            model, optimizer, [images()], lambda done: {"a": done.output.mean(), "b": done.output.abs().mean() / 0.0}
        )
    after = backend.read(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)  # running statistics too
    backend.train_step(model, optimizer, [images()], square)
    assert all(not np.array_equal(before[f"bn.{name}"], backend.read(model)[f"bn.{name}"])
               for name in ("running_mean", "running_var"))  # fmt: skip


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (lambda y: {"good": y.mean(), "bad": 0.5}, "term 'bad' must be a scalar tensor, found float"),
        (lambda y: {"bad": None}, "term 'bad' must be a scalar tensor, found NoneType"),
        (lambda y: {"bad": {"inner": y.mean()}}, "term 'bad' must be a scalar tensor, found dict"),
        (lambda y: {"bad": np.float32(1)}, "term 'bad' must be a scalar tensor, found float32"),
        (lambda y: {"bad": y}, r"term 'bad' must be a scalar tensor, found \(4, 5\)"),
        (lambda y: {}, "no terms"),
        (lambda y: None, "a dict of terms is needed, found NoneType"),
        (lambda y: y.mean(), "a dict of terms is needed, found Tensor"),
    ],
)
def test_a_loss_of_another_type_is_named(backend: Any, terms: Any, message: str) -> None:
    model = small(backend)
    optimizer = backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.01)
    before = backend.read(model)
    with pytest.raises(ModelError, match=message):
        backend.train_step(model, optimizer, [images()], lambda done: terms(done.output))
    with pytest.raises(ModelError, match=message):
        backend.gradients(model, [images()], lambda done: terms(done.output))
    assert all(np.array_equal(before[name], array) for name, array in backend.read(model).items())


class Scaled(nn.Layer):
    """A linear layer with a parameter and a buffer without axes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.gain = self.create_parameter([], default_initializer=nn.initializer.Constant(2.5))
        self.register_buffer("shift", paddle.to_tensor(0.5))

    def forward(self, x: Any) -> Any:
        return self.fc(x) * self.gain + self.shift


@pytest.mark.parametrize("settings", [OptimizerSettings(), OptimizerSettings(kind="adam")])
def test_tensors_without_axes_round_trip(backend: Any, settings: OptimizerSettings) -> None:
    model = backend.place(Scaled(), dtype="float64")
    arrays = backend.read(model)
    assert arrays["gain"].shape == arrays["shift"].shape == () and arrays["gain"] == 2.5
    model = backend.write(model, {**arrays, "gain": np.array(1.25), "shift": np.array(-3.0)})
    found = backend.read(model)
    assert found["gain"].shape == found["shift"].shape == () and (found["gain"], found["shift"]) == (1.25, -3.0)
    assert dict(backend.trace(model, [np.ones((2, 3))]).parameters)["gain"] == ()
    optimizer = backend.make_optimizer(model, settings)
    optimizer.set_lr(0.1)
    backend.train_step(model, optimizer, [np.ones((2, 3))], square)
    other = backend.clone(model)
    restored = backend.make_optimizer(other, settings)
    restored.load_state(optimizer.state())
    restored.set_lr(0.1)
    for one, its in ((model, optimizer), (other, restored)):
        backend.train_step(one, its, [np.ones((2, 3))], square)
    assert backend.read(model)["gain"].shape == ()
    assert all(np.array_equal(array, backend.read(other)[name]) for name, array in backend.read(model).items())
    bad = {"fc.bias": np.zeros(2), "gain": np.zeros(1)}
    with pytest.raises(ModelError, match=r"'gain' has shape \(\), the array has \(1,\)"):
        backend.write(model, bad, partial=True)
    assert backend.read(model)["fc.bias"].any()


def test_a_model_that_cannot_be_copied_is_named(backend: Any) -> None:
    model = Small()
    model.source = (number for number in range(3))
    with pytest.raises(ModelError, match="clone: this Small cannot be copied: cannot pickle 'generator' object"):
        backend.clone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it runs in one process here
        parallel = paddle.DataParallel(Small())
    with pytest.raises(ModelError, match=r"give the model inside, `model._layers`$"):
        backend.clone(parallel)
    assert list(backend.read(backend.clone(parallel._layers))) == list(backend.read(Small()))


def test_captured_features_are_tensors(backend: Any) -> None:
    class Odd(nn.Layer):
        def forward(self, x: Any) -> Any:
            return {"width": 3}

    model = Small()
    model.odd = Odd()
    model.register_forward_post_hook(lambda layer, args, output: layer.odd(output) and output)
    with pytest.raises(ModelError, match="capture: layer 'odd' gives no tensor but a dict"):
        backend.forward(model, [images()], capture=("odd",))


def prune(backend: Any, model: Any, kept: dict[str, dict[int, tuple[int, ...]]]) -> PruneDecision:
    arrays = backend.read(model)
    sizes = {name: arrays[name].shape for name in kept if name in arrays}
    return PruneDecision(importance="l1", pruning_ratio=0.5, groups=(), kept=kept, sizes=sizes)


KEEP = (0, 2, 5)


def small_kept() -> dict[str, dict[int, tuple[int, ...]]]:
    first = {name: {0: KEEP} for name in ("conv.weight", "conv.bias", "dw.weight")}
    norm = {f"bn.{name}": {0: KEEP} for name in ("weight", "bias", "running_mean", "running_var")}
    return {**first, **norm, "fc.weight": {1: tuple(16 * c + i for c in KEEP for i in range(16))}}


def test_surgery_equals_zeroing(backend: Any) -> None:
    model, x = small(backend), images()
    zeroed = backend.clone(model)
    arrays = backend.read(zeroed)
    for name, axes in small_kept().items():
        for axis, kept in axes.items():
            gone = [i for i in range(arrays[name].shape[axis]) if i not in kept]
            if "running" not in name:
                np.moveaxis(arrays[name], axis, 0)[gone] = 0
    backend.write(zeroed, arrays)
    before = model.conv.weight
    backend.remove_channels(model, prune(backend, model, small_kept()))
    assert model.conv.weight is before and backend.read(model)["fc.weight"].shape == (5, 48)
    np.testing.assert_allclose(
        backend.forward(model, [x]).output.numpy(),
        backend.forward(zeroed, [x]).output.numpy(),
        rtol=PRECISE,
        atol=PRECISE,
    )
    assert (model.conv._out_channels, model.bn._num_features) == (3, 3)
    assert (model.dw._groups, model.dw._in_channels, model.dw._out_channels) == (3, 3, 3)
    assert set(backend.read(model)) == set(arrays)
    assert dict(backend.trace(model, [x]).parameters)["dw.weight"] == (3, 1, 3, 3)


@pytest.mark.parametrize("settings", SETTINGS[1:4], ids=lambda s: f"{s.kind}-{s.nesterov}")
def test_training_goes_on_as_if_sliced_by_hand(backend: Any, settings: OptimizerSettings) -> None:
    model = small(backend)
    optimizer = backend.make_optimizer(model, settings)
    optimizer.set_lr(0.01)
    for seed in range(2):
        backend.train_step(model, optimizer, [images(seed=seed)], square)
    arrays, state = backend.read(model), optimizer.state()
    for name, axes in small_kept().items():
        for axis, kept in axes.items():
            arrays[name] = arrays[name].take(kept, axis)
            for key in [key for key in state if key.startswith(f"{name}/") and not key.endswith("step")]:
                state[key] = state[key].take(kept, axis)
    backend.remove_channels(model, prune(backend, model, small_kept()), optimizer)

    fresh = Small()
    fresh.conv, fresh.bn = nn.Conv2D(3, 3, 3, padding=1), nn.BatchNorm2D(3)
    fresh.dw, fresh.fc = nn.Conv2D(3, 3, 3, padding=1, groups=3, bias_attr=False), nn.Linear(48, 5)
    backend.write(backend.place(fresh, dtype="float64"), arrays)
    other = backend.make_optimizer(fresh, settings)
    other.load_state(state)
    other.set_lr(0.01)
    for seed in range(2, 4):
        backend.train_step(model, optimizer, [images(seed=seed)], square)
        backend.train_step(fresh, other, [images(seed=seed)], square)
    expected = backend.read(fresh)
    for name, array in backend.read(model).items():
        np.testing.assert_allclose(
            array,
            expected[name],
            rtol=PRECISE,
            atol=PRECISE,
            err_msg=name,
        )


def test_an_optimizer_that_was_left_out_is_noticed(backend: Any) -> None:
    model = small(backend)
    optimizer = backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.01)
    backend.train_step(model, optimizer, [images()], square)
    backend.remove_channels(model, prune(backend, model, small_kept()))
    with pytest.raises(ModelError, match=r"give the optimizer to whatever resizes the model"):
        backend.train_step(model, optimizer, [images()], square)


def test_two_axes_groups_and_tied_weights(backend: Any) -> None:
    shared = nn.Conv2D(4, 4, 1, bias_attr=False)
    model = backend.place(nn.Sequential(shared, shared, nn.Conv2D(4, 6, 1, groups=2)), dtype="float64")
    arrays, x = backend.read(model), np.random.default_rng(0).normal(size=(2, 2, 3, 3))
    kept = {"0.weight": {0: (0, 3), 1: (0, 3)}, "2.weight": {0: (0, 2, 3, 4), 1: (1,)}, "2.bias": {0: (0, 2, 3, 4)}}
    backend.remove_channels(model, prune(backend, model, kept))
    assert (model[2]._groups, model[2]._in_channels, model[2]._out_channels) == (2, 2, 4)
    w = arrays["0.weight"][np.ix_((0, 3), (0, 3))][..., 0, 0]
    y = np.einsum("oi,oj,njhw->nihw", np.eye(2), w @ w, x)
    last = arrays["2.weight"][list((0, 2, 3, 4)), 1, 0, 0]
    expected = last[None, :, None, None] * y[:, [0, 0, 1, 1]] + arrays["2.bias"][[0, 2, 3, 4]][None, :, None, None]
    np.testing.assert_allclose(
        backend.forward(model, [x]).output.numpy(),
        expected,
        rtol=PRECISE,
        atol=PRECISE,
    )


def test_depthwise_down_to_one_channel(backend: Any) -> None:
    model = nn.Sequential(nn.Conv2D(4, 4, 3, groups=4, bias_attr=False))
    backend.remove_channels(model, prune(backend, model, {"0.weight": {0: (2,)}}))
    assert (model[0]._groups, model[0]._op_type) == (1, "conv2d")
    assert tuple(backend.forward(model, [np.ones((1, 1, 4, 4))]).output.shape) == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"conv.weihgt": {0: (0,)}}, "no parameter 'conv.weihgt' .did you mean"),
        ({"conv.weight": {4: (0,)}}, "axes 0..3, not 4"),
        ({"conv.bias": {0: (1, 0)}}, "must be ascending in 0..5"),
        ({"conv.bias": {0: (0, 6)}}, "must be ascending in 0..5"),
        ({"conv.bias": {0: ()}}, "not empty"),
    ],
)
def test_surgery_refuses_and_changes_nothing(backend: Any, kept: Any, message: str) -> None:
    model = small(backend)
    before = backend.read(model)
    with pytest.raises(ModelError, match=message):
        backend.remove_channels(model, prune(backend, model, {"bn.bias": {0: (0,)}, **kept}))
    assert all(np.array_equal(before[name], array) for name, array in backend.read(model).items())
    decision = prune(backend, model, {"bn.bias": {0: (0,)}})
    backend.remove_channels(model, decision)
    with pytest.raises(ModelError, match=r"the decision has size \(6,\), the model \(1,\)"):
        backend.remove_channels(model, decision)


class Adding(nn.Layer):
    """(x, {"other": y}) -> [x + y]."""

    def forward(self, x: Any, other: Any) -> Any:
        return [x + other["y"]]


class Calling(nn.Layer):
    """Calls with keywords, with a parameter, with nothing to do; a norm with an eps of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 1)
        self.bn = nn.BatchNorm2D(4, epsilon=3e-3)
        self.same = nn.Identity()
        self.add = Adding()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        x = self.conv(x)
        x = self.add(self.bn(x), other={"y": self.same(x)})[0]
        x = self.add(x, other={"y": self.conv.bias.reshape([1, 4, 1, 1])})[0]
        return self.fc(x.mean([2, 3]))


def test_trace_gives_the_calls_with_the_tensors_that_they_have_in_the_graph(backend: Any) -> None:
    graph = backend.trace(Calling(), [np.ones((1, 3, 2, 2))])
    made = {node.name: node for node in graph.nodes if node.kind in ("conv", "batch_norm", "linear")}
    (conv,), (norm,), (out,) = (made[name].outputs for name in ("conv", "bn", "fc"))
    sums = [node.outputs[0] for node in graph.nodes if node.kind == "binary"]
    assert made["conv"].params["bias"] == "conv.bias" and made["bn"].attrs["eps"] == 3e-3
    assert [(call.path, call.inputs, call.outputs) for call in graph.calls] == [
        ("conv", graph.inputs, (conv,)),
        ("bn", (conv,), (norm,)),
        ("same", (conv,), (conv,)),
        ("add", (norm, conv), (sums[0],)),
        ("fc", made["fc"].inputs, (out,)),
    ]


def test_seed(backend: Any) -> None:
    drawn = []
    for _ in range(2):
        backend.seed(7)
        drawn.append(backend.read(Small()))
    assert all(np.array_equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


class Noisy(paddle.io.Dataset):
    """Items that depend on the generators of NumPy and Python."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return np.float64(index + np.random.rand()), np.float64(random.random())


def test_a_loader_is_repeatable_from_three_seeds(backend: Any) -> None:
    def epoch() -> Any:
        backend.seed(7)
        np.random.seed(7)
        random.seed(7)
        loader = paddle.io.DataLoader(Noisy(), batch_size=4, shuffle=True)
        return np.array([[part.numpy() for part in batch] for batch in loader])

    assert np.array_equal(epoch(), epoch())


def test_ops_against_numpy(backend: Any) -> None:
    ops = backend.ops
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    t = paddle.to_tensor(x)
    assert ops.shape(t) == (2, 3, 4)
    for axis in (None, 1, (0, 2)):
        for keepdims in (False, True):
            for name in ("sum", "mean", "max"):
                found = ops.numpy(getattr(ops, name)(t, axis, keepdims))
                np.testing.assert_allclose(found, getattr(np, name)(x, axis=axis, keepdims=keepdims), rtol=PRECISE)
    soft = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    np.testing.assert_allclose(ops.numpy(ops.softmax(t, 1)), soft, rtol=PRECISE)
    np.testing.assert_allclose(ops.numpy(ops.log_softmax(t, 1)), np.log(soft), rtol=PRECISE)
    assert np.array_equal(ops.numpy(ops.clip(t, -0.1, 0.3)), np.clip(x, -0.1, 0.3))
    assert np.array_equal(ops.numpy(ops.where(t > 0, t, -t)), np.abs(x))
    assert np.array_equal(ops.numpy(ops.transpose(t, (2, 0, 1))), x.transpose(2, 0, 1))
    assert np.array_equal(ops.numpy(ops.concat([t, t], 1)), np.concatenate([x, x], 1))
    labels = paddle.to_tensor(np.array([[0, 2], [1, 1]]))
    assert np.array_equal(ops.numpy(ops.one_hot(labels, 3, t)), np.eye(3)[[[0, 2], [1, 1]]])
    assert ops.one_hot(labels, 3, t).dtype == paddle.float64
    assert ops.stop_gradient(paddle.to_tensor(x, stop_gradient=False)).stop_gradient


def test_gradients_of_max_and_clip(backend: Any) -> None:
    x = paddle.to_tensor(np.array([1.0, 1.0, 0.0]), stop_gradient=False)
    assert paddle.grad(backend.ops.max(x), x)[0].tolist() == [0.5, 0.5, 0.0]
    assert paddle.grad(backend.ops.clip(x, 0.0, 0.5).sum(), x)[0].tolist() == [0.0, 0.0, 1.0]
    assert paddle.grad(backend.ops.round(x).sum(), x)[0].tolist() == [0.0, 0.0, 0.0]


def test_namespace_builds_what_pytorch_would(backend: Any) -> None:
    layers = backend.nn
    x = paddle.to_tensor(np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4))
    pooled = layers.AvgPool2d(3, 2, 1)(x)
    padded = np.pad(np.arange(16.0).reshape(4, 4), 1)
    expected = [[padded[r : r + 3, c : c + 3].sum() / 9 for c in (0, 2)] for r in (0, 2)]
    np.testing.assert_allclose(pooled.numpy()[0, 0], expected, rtol=SINGLE)
    assert layers.Conv2d(4, 6, 3, groups=2, bias=False).bias is None
    assert layers.BatchNorm2d(3)._momentum == 0.9 and layers.BatchNorm2d(3)._epsilon == 1e-5
    assert layers.flatten(layers.AdaptiveAvgPool2d(1)(layers.MaxPool2d(2)(x)), 1).shape == [1, 1]
    a, b = layers.split(x, [1, 3], axis=3)
    assert np.array_equal(layers.concat([a, b], axis=3).numpy(), x.numpy())
    assert layers.mean(x, [2, 3], keepdims=True).shape == [1, 1, 1, 1]
    assert layers.Sequential(layers.ReLU(), layers.ReLU6(), layers.Flatten(), layers.Identity())(x).shape == [1, 16]
