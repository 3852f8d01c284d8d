"""The PyTorch backend's quantization: the operation on large and strided tensors, hooks, statistics, calls."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimbridge.conformance.observation import counted
from slimbridge.conformance.quantization import Scaling
from slimbridge.decisions import Site
from slimbridge.errors import ModelError
from slimbridge.graph import Call
from slimbridge.parity.measure import differing, relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import OptimizerSettings, Pass
from slimbridge_torch import create
from slimbridge_torch.fake_quant import _CHUNK
from slimbridge_torch.reduce import coarser, exponent_of

BACKEND = create()
RNG = np.random.default_rng(7)
LOW, HIGH = -7, 6


def oracle(x: Any, step: Any, zero: Any, away: bool) -> tuple[Any, Any, Any]:
    """Values, gradient of x, and d(value)/d(step) before it is summed; all arrays of one dtype."""
    value = x / step
    whole = np.sign(value) * np.floor(np.abs(value) + 0.5) if away else np.rint(value)
    inside = (whole + zero >= LOW) & (whole + zero <= HIGH)
    clipped = np.clip(whole + zero, LOW, HIGH) - zero
    return clipped * step, inside, np.where(inside, whole - value, clipped)


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("spread", [1.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((_CHUNK // 4 + 3, 9), None), ((70, 40, 9, 9), 0), ((300, 7, 9, 9), 1), ((300, 7, 81), -2), ((3, 5), None)],
)
def test_chunks_give_what_the_formula_gives(
    shape: tuple[int, ...], axis: int | None, spread: float, away: bool
) -> None:
    x = RNG.normal(size=shape) * spread
    channels = () if axis is None else (shape[axis],)
    step, zero = RNG.uniform(0.1, 0.2, channels), np.asarray(RNG.integers(-1, 2, channels), np.float64)
    shaped = [-1 if axis is not None and i == axis % len(shape) else 1 for i in range(len(shape))]
    steps, zeros = (item.reshape(shaped) if axis is not None else item for item in (step, zero))
    slope = RNG.normal(size=shape)
    wanted, inside, by_step = oracle(x, steps, zeros, away)
    for strided in (False, True):
        native = torch.tensor(np.moveaxis(x, 0, -1).copy()).movedim(-1, 0) if strided else torch.tensor(x)
        for trained in (False, True):
            given_x, given_step = native.detach().requires_grad_(), torch.tensor(step, requires_grad=trained)
            y = BACKEND.ops.fake_quant(given_x, given_step, torch.tensor(zero), LOW, HIGH, axis, away)
            np.testing.assert_array_equal(y.detach().numpy(), wanted)
            y.backward(torch.tensor(slope))
            np.testing.assert_array_equal(given_x.grad.numpy(), np.where(inside, slope, 0))
            if trained:
                others = tuple(i for i in range(len(shape)) if axis is None or i != axis % len(shape))
                assert (
                    relative(given_step.grad.numpy(), (by_step * slope).sum(others))
                    <= tolerance("gradient_float64").value
                )


def test_what_is_not_clipped_keeps_nothing_for_its_gradient() -> None:
    x = torch.randn(10, requires_grad=True)
    step = x.detach().abs().max() / 127
    y = BACKEND.ops.fake_quant(x, step, None, -127, 127)
    assert y.grad_fn.saved_tensors == ()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(10))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
@settings(deadline=None)
def test_halves_go_away_from_zero_in_float32(values: list[float]) -> None:
    x = np.array([*values, 0.49999997, -0.49999997, 0.5, -2.5, 4194303.5, 8388607.0], np.float32)
    found = BACKEND.ops.fake_quant(torch.tensor(x), torch.tensor(1.0), None, -(2**24), 2**24, None, True).numpy()
    precise = x.astype(np.float64)
    np.testing.assert_array_equal(found, np.sign(precise) * np.floor(np.abs(precise) + 0.5))


# Hooks


Pair = namedtuple("Pair", ["first", "second"])


class Nested(nn.Module):
    """Tensors by keyword and in dicts, named tuples out; a flag makes it fail."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.inner = Inner()
        self.fails = False

    def forward(self, x: Any) -> Any:
        found = self.inner(self.fc(input=x), extra={"a": x, "b": [x, 3]})
        if self.fails:
            self.fc(x[:, :1])
        return found


class Inner(nn.Module):
    """Sums by weights 1, 10, 100."""

    def forward(self, x: Any, extra: Any) -> Any:
        return Pair({"sum": x + 10 * extra["a"] + 100 * extra["b"][0], "none": None}, (extra["b"][1], x))


def nested() -> Nested:
    model = Nested()
    BACKEND.write(model, {"fc.weight": np.eye(2, dtype=np.float32), "fc.bias": np.zeros(2, np.float32)})
    return model


X = np.array([[1.0, -2.0], [3.0, 5.0]], np.float32)


@pytest.mark.parametrize(
    ("key", "total", "second"),
    [
        ("fc", 112, 2),
        ("inner", 112, 2),
        ("inner:input.1", 121, 1),
        ("inner:input.2", 211, 1),
        ("inner:output", 222, 1),
        ("inner:output.1", 111, 2),
        (":input", 222, 2),
    ],
)
def test_nested_tensors_are_found_and_rebuilt(key: str, total: float, second: float) -> None:
    model = BACKEND.insert_quant(nested(), {Site.parse(key): Scaling()})
    found = BACKEND.forward(model, [X]).output
    assert isinstance(found, Pair)
    np.testing.assert_array_equal(found.first["sum"].numpy(), total * X)
    np.testing.assert_array_equal(found.second[1].numpy(), second * X)
    assert found.second[0] == 3


def test_a_layer_that_fails_gets_its_weight_back() -> None:
    model = BACKEND.insert_quant(nested(), {Site("fc", "weight"): Scaling()})
    weight = model.fc._parameters["weight"]
    model.fails = True
    with pytest.raises(RuntimeError):
        BACKEND.forward(model, [X])
    assert model.fc.weight is weight
    assert dict(model.named_parameters())["fc.weight"] is weight
    copied = copy.deepcopy(model)
    copied.fails = False
    np.testing.assert_array_equal(BACKEND.forward(copied, [X]).output.second[1].numpy(), 2 * X)


class Watch:
    """Tells what the layer's own weight was, and keeps a running sum."""

    parameters: Mapping[str, Any] = {}
    reads: Mapping[str, str] = {"weight": "fc.weight"}

    def __init__(self) -> None:
        self.buffers = {"total": np.zeros(2)}
        self.seen: list[Any] = []

    def __call__(self, ops: Any, x: Any, state: Mapping[str, Any], training: bool) -> Any:
        self.seen.append(state["weight"])
        y = x * (1 + state["total"])
        return y, {"total": state["total"] + y.sum(0)} if training else {}


def test_a_hidden_weight_is_read_itself_and_buffers_may_take_part_in_gradients() -> None:
    watch = Watch()
    model = BACKEND.insert_quant(nested(), {Site("fc"): watch, Site("fc", "weight"): Scaling()})

    def loss(done: Pass) -> Mapping[str, Any]:
        return {"loss": done.output.first["sum"].mean()}

    optimizer = BACKEND.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    for _ in range(2):
        BACKEND.train_step(model, optimizer, [X], loss)
    assert all(tensor is model.fc._parameters["weight"] for tensor in watch.seen)
    assert not model.fc.quant_input_total.requires_grad
    np.testing.assert_array_equal(model.fc.quant_input_total.numpy(), X.sum(0) + (X * (1 + X.sum(0))).sum(0))


def test_what_is_kept_moves_with_the_model_and_other_sites_may_read_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    quants = {Site("0"): Scaling(), Site("1"): Scaling(1.0, {"other": "0.quant_input_still"})}
    model = BACKEND.place(BACKEND.insert_quant(BACKEND.place(model, "cpu", "float64"), quants), "cpu", "float32")
    assert model[0].quant_input_factor.dtype == model[0].quant_input_still.dtype == torch.float32
    assert BACKEND.forward(model, [np.zeros((2, 3))]).output.dtype == torch.float32
    with pytest.raises(ModelError, match=r"has no parameter '0\.quant_input_still'"):
        BACKEND.insert_quant(model, {Site("1"): quants[Site("1")]})


def test_refusals_name_the_site() -> None:
    model = nested()
    model.fc.register_buffer("quant_output_factor", torch.zeros(1))
    before = BACKEND.read(model)
    with pytest.raises(ModelError, match="'fc:output': its layer has a 'quant_output_factor' already"):
        BACKEND.insert_quant(model, {Site("fc"): Scaling(), Site("fc", "output"): Scaling()})
    with pytest.raises(ModelError, match=r"no layer 'fb' \(did you mean 'fc'\?\)"):
        BACKEND.insert_quant(model, {Site("fb"): Scaling()})
    assert differing(BACKEND.read(model), before) == 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    BACKEND.insert_quant(model, {Site("fc", argument=1): Scaling()})
    with pytest.raises(ModelError, match=r"'fc:input.1': 1 tensors are there in this call"):
        BACKEND.forward(model, [X])
    embedding = BACKEND.insert_quant(nn.Sequential(nn.Embedding(3, 2)), {Site("0"): Scaling()})
    with pytest.raises(ModelError, match=r"'0': the tensor is of torch.int64; floating ones are allowed"):
        BACKEND.forward(embedding, [np.array([1, 2])])


def test_names_of_sites_do_not_meet() -> None:
    sites = [Site("a", side, n, call) for side in ("input", "output") for n in (0, 1) for call in (None, 0, 1)]
    assert len({site.held("step") for site in sites}) == len(sites)
    assert Site("a", "input", 1, 0).held("step") == "quant_input1_0_step"


def test_held_statistics_leave_the_flags_of_modules_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2))
    BACKEND.hold_statistics(model, True)
    model.train()
    seen = []
    model[2].register_forward_pre_hook(lambda *_: seen.append([module.training for module in model]))
    BACKEND.gradients(model, [X], lambda done: {"loss": done.output.sum()}, train=True)
    assert seen == [[False, True, True]]
    assert all(module.training for module in model.modules())


# Statistics


def test_statistics_over_all_calls_by_keyword_too_and_nothing_stays() -> None:
    model = nested()
    found = BACKEND.reduce(model, [X], [Site("fc"), Site("inner", argument=2), Site("inner", "output", 5)], True)
    assert set(found) == {Site("fc"), Site("inner", argument=2)}
    assert (found[Site("fc")].min, found[Site("fc")].max, found[Site("fc")].mean_absmax) == (-2, 5, 3.5)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(ModelError, match="layer 'inner' has no weight of its own"):
        BACKEND.reduce(model, [X], [Site("inner", "weight")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.float16])
def test_other_types_are_counted_too(dtype: Any) -> None:
    x = torch.tensor([[3, -5], [1, 8]]).to(dtype)
    model = nn.Sequential(nn.Identity())
    found = BACKEND.reduce(model, [x], [Site("0")], True)[Site("0")]
    assert (found.min, found.max, found.mean_absmax, found.absmax) == (-5, 8, 6.5, 8)
    assert found.histogram is not None
    np.testing.assert_array_equal(found.histogram.counts, counted(x.double().numpy()).counts)


def test_an_empty_tensor_gives_no_statistics() -> None:
    assert BACKEND.reduce(nn.Sequential(nn.Identity()), [np.zeros((0, 3))], [Site("0")], True) == {}


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=30), st.integers(0, 40))
@settings(deadline=None)
def test_a_wider_range_adds_neighbours(values: list[float], steps: int) -> None:
    x = np.array([*values, 1001.0], np.float32)
    x[np.abs(x) < 2.0**-80] = 0  # a product that underflows is not exact
    model = nn.Sequential(nn.Identity())
    wide = np.float32(1.5 * 2.0 ** (9 + steps))
    narrow, both = (
        BACKEND.reduce(model, [array], [Site("0")], True)[Site("0")].histogram for array in (x, np.append(x, wide))
    )
    assert narrow is not None and both is not None
    assert (narrow.exponent, both.exponent) == (10, 10 + steps)
    added = counted(np.array([wide])).counts
    np.testing.assert_array_equal(coarser(narrow.counts, steps) + added, both.counts)


@pytest.mark.parametrize(
    ("largest", "exponent"), [(0.0, -126), (1.0, 0), (1.0000001, 1), (0.75, 0), (0.5, -1), (1e-44, -126), (3e38, 128)]
)
def test_the_exponent_is_the_smallest_that_holds(largest: float, exponent: int) -> None:
    assert exponent_of(largest) == exponent


# What a trace tells


class Calls(nn.Module):
    """In place, by keyword, an identity, a parameter as argument, and a result that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.same = nn.Identity()
        self.shift = nn.Parameter(torch.ones(1))
        self.given = nn.Identity()

    def forward(self, x: Any) -> Any:
        y = self.relu(self.same(self.conv(input=x)))
        return y + self.given(self.shift)


def test_calls_have_the_ids_of_their_tensors() -> None:
    graph = BACKEND.trace(Calls(), [np.zeros((1, 1, 2, 2))])
    ids = {node.kind: node.outputs[0] for node in graph.nodes if node.name in ("", "conv", "relu")}
    image, conv, relu = ids["input"], ids["conv"], ids["elementwise"]
    assert graph.calls == (
        Call("conv", (image,), (conv,)),
        Call("same", (conv,), (conv,)),
        Call("relu", (conv,), (relu,)),
    )


def test_a_linear_layer_over_many_axes_is_one_call() -> None:
    graph = BACKEND.trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), [np.zeros((2, 5, 6, 3))])
    linear = next(node for node in graph.nodes if node.kind == "linear")
    assert graph.calls[0] == Call("0", linear.inputs, linear.outputs)


class ByExport(nn.Module):
    """Writes through a view, which torch.export must resolve."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        x = self.fc(x) * 1
        x[:, :2] += 1
        return x


def test_the_fallback_sees_no_fake_quantization_and_tells_no_calls() -> None:
    plain = ByExport()
    model = BACKEND.insert_quant(copy.deepcopy(plain), {Site("fc"): Scaling(), Site("fc", "weight"): Scaling()})
    graphs = [BACKEND.trace(item, [np.zeros((2, 4))]) for item in (plain, model)]
    assert [node.kind for node in graphs[0].nodes] == [node.kind for node in graphs[1].nodes]
    assert graphs[0].parameters == graphs[1].parameters
    assert graphs[1].calls == ()
    assert "quant_input_factor" in dict(model.fc.named_parameters())
