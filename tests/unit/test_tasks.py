"""Data, its order, the digits and the metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimbridge.errors import SlimbridgeError
from slimbridge.tasks import DATA_SETS, Data, DataError, Split, batches, epoch_order, load_data, metrics, to_numpy
from slimbridge.tasks.order import generator


def split(n: int = 10) -> Split:
    return Split(np.arange(n * 4, dtype=np.float32).reshape(n, 1, 2, 2), np.arange(n, dtype=np.int64) % 3)


def philox_words(key: int, count: int) -> list[int]:
    """Philox4x64 with 10 rounds (Salmon et al. 2011), written from the paper; counters 1, 2, ..."""
    mask = 2**64 - 1
    words: list[int] = []
    for counter in range(1, count // 4 + 2):
        x = [counter, 0, 0, 0]
        k = [key & mask, key >> 64]
        for _ in range(10):
            a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(b >> 64) ^ x[1] ^ k[0], b & mask, (a >> 64) ^ x[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += x
    return words[:count]


def test_order_is_the_sort_of_philox_words() -> None:
    key = int.from_bytes(sha256(b"i:7\x00s5:train\x00i:3").digest()[:16], "little")
    words = philox_words(key, 50)
    assert epoch_order(50, 7, "train", 3).tolist() == sorted(range(50), key=lambda i: words[i])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(-5, 2**70), stream=st.lists(st.integers() | st.text(), max_size=3))
def test_order_is_a_permutation_and_repeats(n: int, seed: int, stream: list[int | str]) -> None:
    order = epoch_order(n, seed, *stream)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert np.array_equal(order, epoch_order(n, seed, *stream))


def test_streams_differ() -> None:
    keys: list[tuple[Any, ...]] = [(0,), (1,), (0, 1), (0, "1"), (0, 1, 1), (0, "a", "b"), (0, "ab"), (0, "a\x00s1:b")]
    assert len({tuple(epoch_order(40, *key)) for key in keys}) == len(keys)
    assert len({generator(*key).standard_normal() for key in keys}) == len(keys)


def test_every_position_is_equally_likely() -> None:
    # 10 cells of expectation 200: chi-square with 9 degrees of freedom exceeds 27.9 once in 1,000.
    first = np.bincount([epoch_order(10, 0, epoch)[0] for epoch in range(2000)], minlength=10)
    assert float(((first - 200) ** 2 / 200).sum()) < 27.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 1), "at least 1"), ((2.0, 1), "at least 1"), ((4, "x"), "seed must be"), ((4, 1.5), "seed must be"),
     ((4, 1, None), "stream must be")],
)  # fmt: skip
def test_order_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(SlimbridgeError, match=message):
        epoch_order(*arguments)


def test_batches_of_a_split_cover_it_once_in_order() -> None:
    source = split(10)
    order = epoch_order(10, 0)
    found = list(batches(source, 4, order))
    assert [len(targets) for _, targets in found] == [4, 3, 3]
    assert np.array_equal(np.concatenate([inputs[0] for inputs, _ in found]), source.inputs[order])
    assert np.array_equal(np.concatenate([targets for _, targets in found]), source.targets[order])
    assert np.array_equal(next(batches(source, 10))[1], source.targets)


@pytest.mark.parametrize(("n", "size"), [(1347, 64), (65, 64), (64, 64), (5, 64), (7, 1)])
def test_batches_are_as_equal_as_they_can_be(n: int, size: int) -> None:
    sizes = [len(targets) for _, targets in batches(split(n), size)]
    assert len(sizes) == math.ceil(n / size)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == n


def test_a_split_may_have_several_inputs() -> None:
    source = Split((np.zeros((3, 2), np.float32), np.ones((3, 5), np.int64)), np.zeros(3, np.int64))
    assert [array.shape for array in next(batches(source, 2))[0]] == [(2, 2), (2, 5)]


class Tensor:
    """Has what a framework's tensor has: no array protocol, `numpy` only after `detach` and `cpu`."""

    def __init__(self, array: Any, steps: tuple[str, ...] = ()) -> None:
        self.array, self.steps = array, steps

    def detach(self) -> Tensor:
        return Tensor(self.array, ("detach",))

    def cpu(self) -> Tensor:
        return Tensor(self.array, (*self.steps, "cpu"))

    def numpy(self) -> Any:
        assert self.steps == ("detach", "cpu")
        return self.array


def test_other_sources_are_converted_and_read_again() -> None:
    x, y = np.ones((2, 3), np.float32), np.array([0, 1])
    source = [(Tensor(x), Tensor(y)), [x, [0, 1]], ((x, Tensor(x)), y)]
    for _ in range(2):
        found = list(batches(source))
        assert [len(inputs) for inputs, _ in found] == [1, 1, 2]
        for inputs, targets in found:
            assert all(np.array_equal(array, x) for array in inputs)
            assert np.array_equal(targets, y)


def check_loader(loader: Any, x: Any, y: Any) -> None:
    for _ in range(2):
        found = list(batches(loader))
        assert len(found) == 2
        assert np.array_equal(np.concatenate([inputs[0] for inputs, _ in found]), x)
        assert np.array_equal(np.concatenate([targets for _, targets in found]).ravel(), y)


X, Y = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6)


def test_a_pytorch_loader() -> None:
    torch = pytest.importorskip("torch")
    data = torch.utils.data
    check_loader(data.DataLoader(data.TensorDataset(torch.tensor(X), torch.tensor(Y)), batch_size=4), X, Y)
    assert np.array_equal(to_numpy(torch.tensor(X, requires_grad=True)), X)


def test_a_paddle_loader() -> None:
    paddle = pytest.importorskip("paddle")
    tensors = [paddle.to_tensor(X), paddle.to_tensor(Y)]
    check_loader(paddle.io.DataLoader(paddle.io.TensorDataset(tensors), batch_size=4), X, Y)
    assert np.array_equal(to_numpy(paddle.to_tensor(X, stop_gradient=False)), X)


def test_a_one_shot_source_is_refused_before_it_is_read() -> None:
    read: list[int] = []

    def stream() -> Iterator[Any]:
        read.append(1)
        yield np.zeros((1, 1)), np.zeros(1)

    with pytest.raises(DataError, match="generator can be read only once"):
        batches(stream())
    with pytest.raises(DataError, match="data 'mine': test: a generator can be read only once"):
        Data(split(), stream(), 3, "mine")
    assert not read


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (np.zeros((3, 1), np.float32), np.zeros(2, np.int64), "3 inputs but 2 targets"),
        (np.zeros((0, 1), np.float32), np.zeros(0, np.int64), "no samples"),
        (np.full((2, 1), np.nan, np.float32), np.zeros(2, np.int64), r"2 of 2 values of inputs\[0\] are not finite"),
        (np.zeros((2, 1)), np.zeros(2, np.int64), r"inputs\[0\] must be .* found float64 array of shape \(2, 1\)"),
        (np.zeros((2, 1), np.float32), [0, 1], "targets must be .* found list of 2"),
        ((), np.zeros(2, np.int64), "no samples"),
    ],
)
def test_a_bad_split_is_refused(inputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Split(inputs, targets)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "list gave no batch"),
        (5, "expected a Split or an iterable of batches, found int"),
        ([np.zeros((2, 2))], r"batch 0: expected a pair .* found float64 array of shape \(2, 2\)"),
        ([(np.zeros(2), np.zeros(2), np.zeros(2))], "found tuple of 3"),
        ([{"image": 1}], "found dict"),
        ([(np.zeros((2, 1)), np.zeros(2)), (np.array([[np.inf]]), np.zeros(1))], "batch 1: 1 of 1 values of inputs"),
        ([(np.zeros((2, 1)), np.zeros(3))], "2 inputs but 3 targets"),
        ([(np.zeros((2, 1)), ["a", "b"])], "expected numbers"),
        ([(np.zeros((2, 1)), [[0], [1, 2]])], "not a rectangular array"),
    ],
)
def test_a_bad_source_is_refused(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(batches(source))


@pytest.mark.parametrize(
    ("size", "order", "message"),
    [
        (0, None, "batch_size must be an integer of at least 1, found 0"),
        (True, None, "batch_size"),
        (2, np.array([0, 10]), r"order runs over 0\.\.10, allowed 0\.\.9"),
        (2, np.array([-1]), "order runs over -1"),
        (2, np.array([]), "order must hold integers"),
        (2, np.array([[1]]), "order must hold integers"),
    ],
)
def test_a_bad_order_or_size_is_refused_at_once(size: Any, order: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches(split(), size, order)


def test_an_order_needs_a_split() -> None:
    with pytest.raises(DataError, match="order needs a Split, found list"):
        batches([(np.zeros((1, 1)), np.zeros(1))], 1, np.array([0]))


def test_data_refuses_classes_out_of_range() -> None:
    with pytest.raises(DataError, match=r"data 'mine': train has classes 0\.\.2, allowed 0\.\.1"):
        Data(split(), split(), 2, "mine")
    with pytest.raises(DataError, match="num_classes must be at least 1"):
        Data(split(), split(), 0)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits", channels=1)
    train, test = data.train, data.test
    assert isinstance(train, Split)
    assert isinstance(test, Split)
    assert (len(train), len(test), data.num_classes, data.name) == (1347, 450, 10, "digits")
    inputs = np.concatenate([train.inputs, test.inputs])
    assert inputs.shape == (1797, 1, 8, 8)
    # The same images, each with its own class, whatever the order: undo the normalisation by the two extremes.
    grey = np.rint((inputs - inputs.min()) / (inputs.max() - inputs.min()) * 16).reshape(1797, -1)
    found = np.column_stack([grey, np.concatenate([train.targets, test.targets])])
    digits = load_digits()
    assert sorted(map(tuple, found)) == sorted(map(tuple, np.column_stack([digits.data, digits.target])))
    assert abs(float(np.mean(train.inputs))) < 1e-6
    assert abs(float(np.std(train.inputs)) - 1) < 1e-6
    shares = np.bincount(test.targets) / np.bincount(digits.target)
    assert np.all(np.abs(shares - 0.25) < 0.01)


def test_digits_options() -> None:
    one, three, large = (load_data("digits", **options) for options in ({"channels": 1}, {}, {"image_size": 28}))
    for part in ("train", "test"):
        grey, colour, big = (getattr(data, part) for data in (one, three, large))
        assert colour.inputs.shape[1:] == (3, 8, 8)
        assert big.inputs.shape[1:] == (3, 28, 28)
        assert np.array_equal(colour.inputs, np.repeat(grey.inputs, 3, axis=1))
        assert np.array_equal(grey.targets, big.targets)


def test_digits_are_enlarged_as_pytorch_interpolates() -> None:
    torch = pytest.importorskip("torch")
    small, large = (load_data("digits", channels=1, image_size=size).test for size in (8, 20))
    assert isinstance(small, Split)
    assert isinstance(large, Split)
    expected = torch.nn.functional.interpolate(torch.tensor(small.inputs), size=20, mode="bilinear").numpy()
    # Each is normalised by its own constants, so they agree up to one scale and one shift.
    slope, shift = np.polyfit(expected.ravel(), np.ravel(large.inputs), 1)
    assert np.abs(slope * expected + shift - large.inputs).max() < 1e-5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("digit", {}, r"data set 'digit' is unknown \(did you mean 'digits'\?\); known: digits"),
        ("digits", {"channel": 1}, r"option 'channel' is unknown \(did you mean 'channels'\?\)"),
        ("digits", {"channels": 2}, "channels must be 1 or 3, found 2"),
        ("digits", {"image_size": 7}, "image_size must be an integer 8..256, found 7"),
        ("digits", {"image_size": 16.0}, "image_size must be an integer"),
    ],
)
def test_load_data_refuses(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(name, **options)


def test_another_data_set_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATA_SETS, "mine", lambda size=3: Data(split(size), split(size), 3, "mine"))
    assert len(load_data("mine", size=5).train) == 5  # type: ignore[arg-type]


def test_accuracy_counts() -> None:
    outputs = np.array([[0.1, 0.9], [2.0, -1.0], [0.0, 0.0], [-np.inf, 3.0]])
    assert metrics.get("accuracy")(outputs, np.array([1, 1, 0, 1])) == 0.75


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        ([[np.nan, 1.0], [0.0, 1.0], [np.nan, np.nan]], [0, 1, 1], "outputs of 2 of 3 samples hold NaN"),
        ([[0.0, 1.0]], [0, 1], r"found \(1, 2\) and \(2,\)"),
        ([0.0, 1.0], [0, 1], r"found \(2,\) and \(2,\)"),
        (np.zeros((0, 3)), np.zeros(0, int), "at least 1"),
        ([[0.0, 1.0]], [2], r"integers in 0\.\.1, found int64 in 2\.\.2"),
        ([[0.0, 1.0]], [1.0], "targets must be integers"),
    ],
)
def test_accuracy_refuses(outputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.accuracy(np.array(outputs), np.array(targets))


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"metric 'acuracy' is unknown \(did you mean 'accuracy'\?\)"):
        metrics.get("acuracy")
