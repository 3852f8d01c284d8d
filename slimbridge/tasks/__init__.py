"""Tasks: data, its order, and metrics. Data sets are found by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from slimbridge.errors import listed, nearest
from slimbridge.tasks import digits, metrics
from slimbridge.tasks.data import Data, DataError, Split, batches, to_numpy
from slimbridge.tasks.order import epoch_order

__all__ = ["DATA_SETS", "Data", "DataError", "Split", "batches", "epoch_order", "load_data", "metrics", "to_numpy"]

DATA_SETS: dict[str, Callable[..., Data]] = {"digits": digits.load}
"""Name -> function of keyword options that loads the data; add to it to make another set known."""


def load_data(name: str, **options: Any) -> Data:
    """Load a data set by name.

    Args:
        name: a key of `DATA_SETS`.
        options: the loader's own options.

    Raises:
        DataError: an unknown name or option, or a value that the loader does not allow.
    """
    if name not in DATA_SETS:
        raise DataError(f"data set '{name}' is unknown{nearest(name, DATA_SETS)}; known: {listed(DATA_SETS)}")
    loader = DATA_SETS[name]
    allowed = inspect.signature(loader).parameters
    for option in options:
        if option not in allowed:
            raise DataError(
                f"data set '{name}': option '{option}' is unknown{nearest(option, allowed)}; allowed: {listed(allowed)}"
            )
    return loader(**options)
