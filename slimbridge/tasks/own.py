"""A user's own data, in the forms that are natural for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimbridge.errors import RunError
from slimbridge.tasks.data import Data, Split, to_numpy


def as_data(data: Data | tuple[Any, Any] | None) -> Data | None:
    """What a user gives as data: None, `Data`, or a pair (train, test) of arrays, loaders or lists of batches.

    Raises:
        RunError: it is something else.
    """
    if data is None or isinstance(data, Data):
        return data
    if isinstance(data, tuple) and all(hasattr(part, "shape") for part in data):
        raise RunError("data is a pair (train, test), and each of them a pair: ((x, y), (x_test, y_test))")
    if not isinstance(data, tuple) or len(data) != 2:
        raise RunError(f"data must be slimbridge.Data or a pair (train, test), found {type(data).__name__}")
    train, test = (_as_split(part) for part in data)
    return Data(train, test, name="own data")


def _plain(array: Any) -> Any:
    """Integers as int64, real numbers as float32."""
    return array.astype(np.int64 if array.dtype.kind in "iub" else np.float32)


def _as_split(part: Any) -> Any:
    """A pair of arrays or tensors, several inputs in a tuple, is a split; anything else is an iterable of batches."""
    if not isinstance(part, tuple) or len(part) != 2 or not hasattr(part[1], "shape"):
        return part
    several = isinstance(part[0], tuple)
    inputs = part[0] if several else (part[0],)
    if not inputs or not all(hasattr(array, "shape") for array in inputs):
        return part
    arrays = tuple(_plain(to_numpy(array)) for array in inputs)
    return Split(arrays if several else arrays[0], _plain(to_numpy(part[1])))
