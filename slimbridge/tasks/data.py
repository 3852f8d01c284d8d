"""Data as the training loop sees it: arrays in memory, or any re-iterable of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import SlimbridgeError

Array: TypeAlias = NDArray[Any]
Batch: TypeAlias = tuple[tuple[Array, ...], Array]


class DataError(SlimbridgeError):
    """Data, or a request for data, that cannot be used."""


@dataclass(frozen=True)
class Split:
    """Samples in memory.

    Attributes:
        inputs: (N, C, H, W) float32 for images; a tuple of arrays for a model with several inputs. Float32 or int64.
        targets: (N,) int64 classes 0..K-1; other tasks may use more axes or float32.

    Raises:
        DataError: a wrong type, unequal lengths, no sample at all, or values that are not finite.
    """

    inputs: Array | tuple[Array, ...]
    targets: Array

    def __post_init__(self) -> None:
        arrays = _as_tuple(self.inputs)
        for where, array in [*((f"inputs[{i}]", item) for i, item in enumerate(arrays)), ("targets", self.targets)]:
            if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.int64) or array.ndim < 1:
                raise DataError(
                    f"split: {where} must be a float32 or int64 array of at least 1 axis, found {_described(array)}"
                )
        _check_batch("split", arrays, self.targets)

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        train: samples to learn from; a `Split`, or a re-iterable of (inputs, targets) batches such as a DataLoader.
        test: samples to measure on, the same kinds.
        num_classes: number of classes, None where the task has none.
        name: what reports call it.

    Raises:
        DataError: a part can be read only once or not at all, or a class lies outside 0..num_classes-1.
    """

    train: Split | Iterable[Any]
    test: Split | Iterable[Any]
    num_classes: int | None = None
    name: str = "data"

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise DataError(f"data '{self.name}': num_classes must be at least 1, found {self.num_classes}")
        for part, source in (("train", self.train), ("test", self.test)):
            _check_source(f"data '{self.name}': {part}", source)
            if isinstance(source, Split) and self.num_classes is not None:
                self._check_classes(part, source.targets, self.num_classes)

    def _check_classes(self, part: str, targets: Array, classes: int) -> None:
        if targets.ndim == 1 and targets.dtype == np.int64 and not 0 <= targets.min() <= targets.max() < classes:
            raise DataError(
                f"data '{self.name}': {part} has classes {targets.min()}..{targets.max()}, allowed 0..{classes - 1}"
            )


def batches(
    source: Split | Iterable[Any], batch_size: int = 64, order: NDArray[np.integer[Any]] | None = None
) -> Iterator[Batch]:
    """One pass over the data as (tuple of input arrays, target array).

    A `Split` of n samples gives ceil(n / batch_size) batches whose sizes differ by at most one: a last batch of
    two or three samples would ruin the statistics of batch normalisation, and dropping it would lose samples.

    Args:
        source: a `Split`, or a re-iterable of (inputs, targets) batches of NumPy arrays or framework tensors;
            its inputs may be one array or a tuple.
        batch_size: most samples of a batch, for a `Split`; other sources have their own.
        order: indices into a `Split`, in the order wanted; None takes all as they lie.

    Raises:
        DataError: a one-shot iterator, no sample, a batch that is not a pair of equal lengths, values that are not
            finite, or an order that does not fit.
    """
    _check_source("batches", source)
    if isinstance(source, Split):
        return _sliced(source, _checked_size(batch_size), _checked_order(order, len(source)))
    if order is not None:
        raise DataError(f"batches: an order needs a Split, found {type(source).__name__}; it orders its own batches")
    return _converted(source)


def to_numpy(value: object) -> Array:
    """A NumPy array of an array, a sequence of numbers, or a tensor of any framework (by duck typing).

    Raises:
        DataError: the value is not numeric.
    """
    if isinstance(value, np.ndarray):
        array = value
    else:
        for step in ("detach", "cpu", "numpy"):
            method = getattr(value, step, None)
            value = method() if callable(method) else value
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise DataError(f"batches: not a rectangular array: {error}") from error
    if array.dtype.kind not in "fiub":
        raise DataError(f"batches: expected numbers, found {_described(value)}")
    return array


def check_classes(targets: Array, output: tuple[int, ...], part: str) -> None:
    """Refuse labels that are not integers 0..K-1, one for each sample, for outputs (N, K).

    Raises:
        DataError: what was found, and what is allowed.
    """
    if len(output) != 2:
        raise DataError(f"classification needs outputs (N, classes), the model gives {output}")
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        raise DataError(
            f"{part}: labels must be integers of shape (N,), found {targets.dtype} of shape {targets.shape}; "
            "turn one-hot labels into classes, or pass a loss of your own"
        )
    if targets.min() < 0 or targets.max() >= output[1]:
        raise DataError(
            f"{part}: labels {targets.min()}..{targets.max()} for a model of {output[1]} classes (0..{output[1] - 1})"
        )


def _sliced(split: Split, size: int, order: NDArray[np.int64]) -> Iterator[Batch]:
    inputs = _as_tuple(split.inputs)
    for rows in np.array_split(order, -(-len(order) // size)):
        yield tuple(array[rows] for array in inputs), split.targets[rows]


def _converted(source: Iterable[Any]) -> Iterator[Batch]:
    index = -1
    for index, item in enumerate(source):
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(
                f"batch {index}: expected a pair (inputs, targets), inputs a tuple where there are "
                f"several; found {_described(item)}"
            )
        inputs = tuple(to_numpy(part) for part in _as_tuple(item[0]))
        targets = to_numpy(item[1])
        _check_batch(f"batch {index}", inputs, targets)
        yield inputs, targets
    if index < 0:
        raise DataError(f"batches: {type(source).__name__} gave no batch")


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} array of shape {value.shape}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


def _check_batch(where: str, inputs: tuple[Array, ...], targets: Array) -> None:
    lengths = [array.shape[0] if array.ndim else 0 for array in (*inputs, targets)]
    if len(lengths) < 2 or min(lengths) == 0:
        raise DataError(f"{where}: no samples (shapes {[array.shape for array in (*inputs, targets)]})")
    if len(set(lengths)) > 1:
        raise DataError(f"{where}: {' and '.join(map(str, lengths[:-1]))} inputs but {lengths[-1]} targets")
    for name, array in [*((f"inputs[{i}]", item) for i, item in enumerate(inputs)), ("targets", targets)]:
        bad = int(np.count_nonzero(~np.isfinite(array))) if array.dtype.kind == "f" else 0
        if bad:
            raise DataError(f"{where}: {bad} of {array.size} values of {name} are not finite")


def _check_source(where: str, source: object) -> None:
    if isinstance(source, Split):
        return
    try:
        one_shot = iter(source) is source  # type: ignore[call-overload]
    except TypeError:
        raise DataError(f"{where}: expected a Split or an iterable of batches, found {type(source).__name__}") from None
    if one_shot:
        raise DataError(
            f"{where}: a {type(source).__name__} can be read only once and several passes are needed; "
            "give a list, a Split or a DataLoader"
        )


def _checked_size(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise DataError(f"batches: batch_size must be an integer of at least 1, found {size!r}")
    return int(size)


def _checked_order(order: NDArray[np.integer[Any]] | None, length: int) -> NDArray[np.int64]:
    if order is None:
        return np.arange(length, dtype=np.int64)
    indices = np.asarray(order)
    if indices.ndim != 1 or indices.dtype.kind not in "iu" or indices.size == 0:
        raise DataError(f"batches: order must hold integers on one axis, at least one; found {_described(indices)}")
    if indices.min() < 0 or indices.max() >= length:
        raise DataError(f"batches: order runs over {indices.min()}..{indices.max()}, allowed 0..{length - 1}")
    return indices.astype(np.int64)
