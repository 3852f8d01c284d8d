"""Metrics by name: functions from a model's outputs and the targets, as arrays, to one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import listed, nearest
from slimbridge.tasks.data import DataError

Metric: TypeAlias = Callable[[NDArray[Any], NDArray[Any]], float]


def accuracy(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    """Share of samples whose largest output is that of the target's class; of equal outputs the first counts.

    Args:
        outputs: (N, K) scores, K the number of classes.
        targets: (N,) integers 0..K-1.

    Returns:
        0..1.

    Raises:
        DataError: shapes that do not fit, no sample, NaN in the outputs, or a class outside 0..K-1.
    """
    outputs, targets = np.asarray(outputs), np.asarray(targets)
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1] or outputs.size == 0:
        raise DataError(
            f"accuracy: expected outputs (N, K) and targets (N,), N and K at least 1; "
            f"found {outputs.shape} and {targets.shape}"
        )
    bad = int(np.isnan(outputs).any(axis=1).sum())
    if bad:
        raise DataError(f"accuracy: the outputs of {bad} of {len(outputs)} samples hold NaN")
    if targets.dtype.kind not in "iu" or targets.min() < 0 or targets.max() >= outputs.shape[1]:
        raise DataError(
            f"accuracy: targets must be integers in 0..{outputs.shape[1] - 1}, "
            f"found {targets.dtype} in {targets.min()}..{targets.max()}"
        )
    return float(np.mean(outputs.argmax(axis=1) == targets))


METRICS: dict[str, Metric] = {"accuracy": accuracy}
"""Name -> metric; add to it to make another one known."""


def get(name: str) -> Metric:
    """The metric of that name.

    Raises:
        DataError: no metric has the name; it lists those there are.
    """
    if name not in METRICS:
        raise DataError(f"metric '{name}' is unknown{nearest(name, METRICS)}; known: {listed(METRICS)}")
    return METRICS[name]
