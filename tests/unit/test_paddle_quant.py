"""Fake quantization and statistics on Paddle, against NumPy: what the conformance cases do not say of this backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

paddle = pytest.importorskip("paddle", reason="PaddlePaddle is an optional extra")

import slimbridge_paddle  # noqa: E402
from slimbridge.decisions import QuantParams, Site  # noqa: E402
from slimbridge.errors import ModelError  # noqa: E402
from slimbridge.parity import tolerance  # noqa: E402
from slimbridge.ports import HISTOGRAM_BINS, Histogram, OptimizerSettings, Pass  # noqa: E402
from slimbridge.quantize.fake import Static  # noqa: E402
from slimbridge_paddle import buffers, fake_quant  # noqa: E402
from slimbridge_paddle import reduce as reducing  # noqa: E402

BACKEND: Any = slimbridge_paddle.create()
OPS = BACKEND.ops
PRECISE = tolerance("gradient_float64").value
nn = paddle.nn
F = paddle.nn.functional
GRID = QuantParams(step=(0.25,), low=-8, high=7)


class Net(nn.Layer):
    """conv -> norm -> relu, twice through the same relu, -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 3)
        self.bn = nn.BatchNorm2D(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(4, 5)
        self.fail = False

    def forward(self, x: Any) -> Any:
        x = self.relu(self.relu(self.bn(self.conv(x))) - 0.5)
        if self.fail:
            raise RuntimeError("on purpose")
        return self.fc(x.mean([2, 3]))


class Learned:
    """A grid with a step that is trained, and a count of its training passes."""

    parameters: Mapping[str, Any] = {"step": np.array(0.1)}
    buffers: Mapping[str, Any] = {"count": np.array(0)}

    def __init__(self, reads: Mapping[str, str] | None = None, shape: tuple[int, ...] = ()) -> None:
        self.reads = reads or {}
        self.shape = shape

    def __call__(self, ops: Any, x: Any, state: Any, training: bool) -> Any:
        changed = {"count": (state["count"] + 1).reshape(list(self.shape))} if training else {}
        return ops.fake_quant(x, state["step"], None, -127, 127), changed


def images(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(4, 3, 6, 6)).astype(np.float32)


def square(done: Pass) -> dict[str, Any]:
    return {"square": (done.output * done.output).mean()}


def optimizer(model: Any, kind: Any = "sgd") -> Any:
    made = BACKEND.make_optimizer(model, OptimizerSettings(kind))
    made.set_lr(0.01)
    return made


def unchanged(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


def nearest(values: Any, away: bool) -> Any:
    """Whole numbers, halves to even or away from zero, by a way of its own."""
    whole = np.floor(np.abs(values.astype(np.longdouble)) + np.longdouble(0.5)) * np.sign(values)
    return whole.astype(values.dtype) if away else np.rint(values)


def expected(x: Any, step: Any, zero: Any, axis: int | None, away: bool) -> Any:
    """The formula and its gradients for a slope of 1, over -20..15."""
    shape = [1] * x.ndim if axis is None else [-1 if index == axis else 1 for index in range(x.ndim)]
    step, zero = step.reshape(shape), zero.reshape(shape)
    value = x / step
    whole = nearest(value, away) + zero
    inside = (whole >= -20) & (whole <= 15)
    clipped = np.clip(whole, -20, 15) - zero
    rest = tuple(index for index in range(x.ndim) if index != axis)
    return clipped * step, inside.astype(x.dtype), (clipped - np.where(inside, value, 0)).sum(rest)


@pytest.mark.parametrize("memory", ["shared", "device"])
@pytest.mark.parametrize("away", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 400, 7), (4, 5, 1), (2, 3, 4, 5)])
def test_fake_quant_on_both_ways_of_computing(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], away: bool, memory: str
) -> None:
    monkeypatch.setattr(buffers, "BLOCK", 64)  # many blocks, cut along each of the axes
    if memory == "device":
        monkeypatch.setattr(fake_quant, "on_cpu", lambda tensor: False)
    rng = np.random.default_rng(0)
    for axis in (None, *range(-1, len(shape))):
        count = () if axis is None else (shape[axis],)
        x, step = rng.normal(size=shape) * 2, rng.uniform(0.05, 0.4, count)
        x.flat[:4] = np.array([0.5, 1.5, -2.5, 0.49999999999999994]) * step.flat[0]
        zero = np.asarray(rng.integers(-3, 4, count), np.float64)
        natives = [paddle.to_tensor(array, stop_gradient=False) for array in (x, step)]
        made = OPS.fake_quant(*natives, paddle.to_tensor(zero), -20, 15, axis, away)
        made.sum().backward()
        values, passed, by_step = expected(x, step, zero, None if axis is None else axis % len(shape), away)
        assert np.array_equal(made.numpy(), values)
        assert np.array_equal(natives[0].grad.numpy(), passed)
        np.testing.assert_allclose(natives[1].grad.numpy(), by_step, rtol=PRECISE, atol=PRECISE)
        with paddle.no_grad():
            assert np.array_equal(OPS.fake_quant(*natives, paddle.to_tensor(zero), -20, 15, axis, away), values)
        low, high = OPS.extremes(natives[0], axis)
        rest = None if axis is None else tuple(index for index in range(len(shape)) if index != axis % len(shape))
        assert np.array_equal(low.numpy(), x.min(rest)) and np.array_equal(high.numpy(), x.max(rest))


def test_a_value_just_below_a_half_is_not_rounded_away() -> None:
    x = np.array([0.49999997, 0.5, -0.5, 1.5, 8388609.0, -2.4999998], np.float32)
    found = OPS.fake_quant(paddle.to_tensor(x), paddle.to_tensor(np.float32(1)), None, -(2**30), 2**30, None, True)
    assert found.numpy().tolist() == [0, 1, -1, 2, 8388609, -2]


def test_what_is_not_finite_gets_no_gradient() -> None:
    x = paddle.to_tensor(np.array([np.nan, np.inf, -np.inf, 1.0], np.float32), stop_gradient=False)
    found = OPS.fake_quant(x, paddle.to_tensor(np.float32(0.5)), None, -8, 7)
    found.sum().backward()
    assert np.array_equal(found.numpy(), np.array([np.nan, 3.5, -4, 1], np.float32), equal_nan=True)
    assert x.grad.numpy().tolist() == [0, 0, 0, 1]


def test_gradients_of_tensors_with_gaps_and_of_several_readers() -> None:
    """Nothing is clipped, so that the gradient is handed on as it is: it must not be written to by another reader."""
    step = paddle.to_tensor(np.array([0.1, 0.2, 0.3, 0.4]))
    x = paddle.to_tensor(np.random.default_rng(0).normal(size=(5, 4)), stop_gradient=False)
    slope = np.random.default_rng(1).normal(size=(5, 4))
    turned = paddle.transpose(x, [1, 0])
    once = paddle.transpose(OPS.fake_quant(turned, step, None, -99, 99, 0), [1, 0])
    once.retain_grads()
    twice = OPS.fake_quant(once, step, None, -99, 99, 1) + once
    (twice * paddle.to_tensor(slope)).sum().backward()
    assert np.array_equal(once.grad.numpy(), 2 * slope) and np.array_equal(x.grad.numpy(), 2 * slope)


@pytest.mark.parametrize("side", ["input", "output", "weight"])
def test_a_pass_that_failed_leaves_nothing_behind(side: Any) -> None:
    model = Net()
    BACKEND.insert_quant(model, {Site("relu", "output", call=1): Learned(), Site("fc", side): Static(GRID)})
    plain, before = BACKEND.forward(model, [images()]).output.numpy(), BACKEND.read(model)
    model.fail = True
    with pytest.raises(RuntimeError, match="on purpose"):
        BACKEND.train_step(model, optimizer(model), [images()], square)
    model.fail = False
    assert unchanged(BACKEND.read(model), before)  # the count and the running statistics too
    assert "weight" not in model.fc.__dict__
    assert np.array_equal(BACKEND.forward(model, [images()]).output.numpy(), plain)
    model.fc.register_forward_pre_hook(lambda layer, args: args[0][:, :2])
    with pytest.raises(ValueError, match="matmul"):
        BACKEND.forward(model, [images()])
    assert "weight" not in model.fc.__dict__


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_a_learned_step_is_trained_by_each_optimizer_and_saved(kind: Any) -> None:
    model = Net()
    BACKEND.insert_quant(model, {Site("conv"): Learned(), Site("conv", "weight"): Learned()})
    trained = optimizer(model, kind)
    for _ in range(2):
        BACKEND.train_step(model, trained, [images()], square)
    found = BACKEND.read(model)
    assert found["conv.quant_input_step"].shape == () and found["conv.quant_input_step"] != np.float32(0.1)
    assert found["conv.quant_weight_count"] == 2
    twin = BACKEND.clone(model)
    other = optimizer(twin, kind)
    other.load_state(trained.state())
    for one, its in ((model, trained), (twin, other)):
        BACKEND.train_step(one, its, [images(1)], square)
    assert unchanged(BACKEND.read(model), BACKEND.read(twin))


def test_a_trace_leaves_what_is_inserted_and_forward_of_an_instance_stays() -> None:
    model = Net()
    plain = BACKEND.forward(model, [images()]).output.numpy()
    own = model.relu.forward
    model.relu.forward = lambda x: own(x) * 2
    doubled = BACKEND.forward(model, [images()]).output.numpy()
    BACKEND.insert_quant(model, {Site("relu"): Static(GRID), Site("conv", "weight"): Static(GRID)})
    quantized = BACKEND.forward(model, [images()]).output.numpy()
    BACKEND.trace(model, [images()])
    assert np.array_equal(BACKEND.forward(model, [images()]).output.numpy(), quantized)
    BACKEND.insert_quant(model, {})
    assert np.array_equal(BACKEND.forward(model, [images()]).output.numpy(), doubled)
    assert not np.array_equal(doubled, plain) and not np.array_equal(doubled, quantized)


def test_what_cannot_be_inserted_is_named() -> None:
    model = Net()
    model.other = model.fc
    model.bn.quant_input_step = 1
    two_names = {Site("fc"): Static(GRID), Site("other"): Static(GRID)}
    for quants, message in (
        ({Site("cnov"): Static(GRID)}, "quantize: the model has no layer 'cnov'"),
        ({Site("relu", "weight"): Static(GRID)}, "quantize 'relu:weight': layer 'relu' has no weight"),
        ({Site("fc"): Learned({"a": "bn.runing_mean"})}, "no parameter 'bn.runing_mean' .did you mean"),
        ({Site("bn"): Learned()}, "'bn' has an attribute 'quant_input_step' of its own"),
        (two_names, "'fc' and 'other' are one tensor"),
    ):
        with pytest.raises(ModelError, match=message):
            BACKEND.insert_quant(model, quants)
    assert "forward" not in model.fc.__dict__
    BACKEND.insert_quant(model, {Site("fc", "input", 1): Static(GRID)})
    with pytest.raises(ModelError, match=r"quantize 'fc:input.1': call 0 of the layer has 1 input tensors"):
        BACKEND.forward(model, [images()])
    BACKEND.insert_quant(model, {Site("fc"): Learned(shape=(1,))})
    with pytest.raises(ModelError, match=r"'count' became of shape \(1,\), it has \(\)"):
        BACKEND.train_step(model, optimizer(model), [images()], square)
    embedded = nn.Sequential(nn.Embedding(3, 2))
    BACKEND.insert_quant(embedded, {Site("0"): Static(GRID)})
    with pytest.raises(ModelError, match="the tensor is of int64; floating ones are allowed"):
        BACKEND.forward(embedded, [np.array([1, 2])])


def test_a_part_of_a_larger_model_counts_its_training_steps() -> None:
    model = Net()
    BACKEND.insert_quant(model, {Site("conv"): Learned()})
    whole = nn.Sequential(model, nn.Linear(5, 2))
    BACKEND.train_step(whole, optimizer(whole), [images()], square)
    whole.train()
    model.bn.eval()
    whole(paddle.to_tensor(images()))  # a pass that is no training step
    assert BACKEND.read(whole)["0.conv.quant_input_count"] == 1


class Tracking:
    """Reads a running statistic and what another fake quantization keeps; tells what it was given."""

    parameters: Mapping[str, Any] = {}
    buffers: Mapping[str, Any] = {}
    reads: Mapping[str, str] = {"variance": "bn.running_var", "step": "conv.quant_input_step", "weight": "fc.weight"}

    def __call__(self, ops: Any, x: Any, state: Any, training: bool) -> Any:
        self.seen = {name: ops.numpy(value) for name, value in state.items()}
        return x, {}


def test_reads_follow_canonical_names_and_layout() -> None:
    model, quant = Net(), Tracking()
    BACKEND.insert_quant(model, {Site("fc"): quant, Site("conv"): Learned(), Site("fc", "weight"): Static(GRID)})
    BACKEND.train_step(model, optimizer(model), [images()], square)
    BACKEND.forward(model, [images()])
    found = BACKEND.read(model)
    for name, read in quant.reads.items():
        assert np.array_equal(quant.seen[name], found[read])


def test_held_statistics_give_back_what_a_layer_had() -> None:
    model = nn.Sequential(nn.BatchNorm2D(3, use_global_stats=False), nn.BatchNorm2D(3))
    for hold in (True, True, False, False):
        BACKEND.hold_statistics(model, hold)
    assert [layer._use_global_stats for layer in model] == [False, None]


@given(st.integers(-140, 140), st.integers(0, 2**32 - 1), st.sampled_from(["float32", "float64"]))
@settings(max_examples=40, deadline=None)
def test_histogram_of_any_magnitude_on_both_ways_of_computing(power: int, seed: int, dtype: str) -> None:
    x = np.random.default_rng(seed).normal(size=(3, 50))
    with np.errstate(over="ignore", under="ignore"):
        x = np.clip(np.ldexp(x, power).astype(dtype), np.finfo(dtype).min, np.finfo(dtype).max)
    found = reducing.statistics(paddle.to_tensor(x), True)
    exponent = reducing.exponent_of(float(np.abs(x).max()))
    assert np.abs(x).max() <= 2.0**exponent and (exponent == -126 or np.abs(x).max() > 2.0 ** (exponent - 1))
    places = np.floor(np.ldexp(x.astype(np.float64), 12 - exponent)).astype(np.int64) + HISTOGRAM_BINS // 2
    counts = np.bincount(np.minimum(places, HISTOGRAM_BINS - 1).ravel(), minlength=HISTOGRAM_BINS)
    assert found.histogram is not None and found.histogram.exponent == exponent
    assert np.array_equal(found.histogram.counts, counts)
    assert np.array_equal(reducing._device_counts(paddle.to_tensor(x), exponent), counts)


@given(st.integers(0, 2**32 - 1), st.integers(-20, 20), st.integers(-20, 20))
@settings(max_examples=30, deadline=None)
def test_merged_histograms_are_that_of_all_entries(seed: int, one: int, other: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [np.ldexp(rng.uniform(-0.99, 0.99, size=(2, 30)), power) for power in (one, other)]
    seen = [reducing.statistics(paddle.to_tensor(part), True) for part in parts]
    whole = reducing.statistics(paddle.to_tensor(np.concatenate(parts)), True)
    both = seen[0].merged(seen[1])
    assert (both.low, both.high, both.samples) == (whole.low, whole.high, whole.samples)
    assert isinstance(both.histogram, Histogram) and isinstance(whole.histogram, Histogram)
    assert both.histogram.exponent == whole.histogram.exponent
    assert np.array_equal(both.histogram.counts, whole.histogram.counts)


def test_reduce_sees_integers_and_leaves_out_what_is_not_there() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    sites = [Site.parse(key) for key in ("0", "0:input.3", "1:input#4", "1")]
    found = BACKEND.reduce(model, [np.array([2, 1])], sites, True)
    assert set(found) == {Site("0"), Site("1")}
    assert (found[Site("0")].min, found[Site("0")].max, found[Site("0")].mean_absmax) == (1, 2, 1.5)
    with pytest.raises(ModelError, match="reduce: the model has no layer '7'"):
        BACKEND.reduce(model, [np.array([1])], [Site("7")])
    with pytest.raises(ModelError, match="reduce '1:weight': layer '1' has no weight"):
        BACKEND.reduce(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [np.ones((1, 2))], [Site("1", "weight")])


def test_views_share_the_memory_and_keep_it() -> None:
    tensor = paddle.arange(6, dtype="float32").reshape([2, 3])
    seen = buffers.view(tensor)
    seen[0, 0] = 7
    assert float(tensor[0, 0]) == 7 and seen.shape == (2, 3)
    del tensor
    assert seen[1, 2] == 5
    assert buffers.view(paddle.zeros([0, 3])).shape == (0, 3)


@given(st.tuples(*[st.integers(1, 40)] * 3), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_blocks_cover_each_entry_once_without_gaps(sizes: tuple[int, int, int], block: int) -> None:
    before, buffers.BLOCK = buffers.BLOCK, block
    try:
        count = np.zeros(sizes, int)
        for part in buffers.blocks(sizes):
            count[part] += 1
            assert count[part].size <= block and count[part].flags.c_contiguous
        assert (count == 1).all()
    finally:
        buffers.BLOCK = before
