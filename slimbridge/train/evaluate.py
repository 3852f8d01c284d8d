"""Outputs and the metric over a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from slimbridge.errors import SlimbridgeError
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.tasks import Split, batches
from slimbridge.tasks.metrics import Metric
from slimbridge.train.progress import Progress, Quiet

BATCH = 256


def outputs_of(backend: Backend, model: Model, inputs: Sequence[Array]) -> Array:
    """The model's first output on one batch, NumPy."""
    return backend.ops.numpy(tensors_in(backend.forward(model, inputs).output)[0])


def evaluate(
    backend: Backend, model: Model, source: Split | Iterable[Any], metric: Metric, progress: Progress | None = None
) -> float:
    """The metric over the whole data.

    Args:
        backend: the model's backend.
        model: run in eval mode, left as it is.
        source: the data.
        metric: from all outputs and all targets, concatenated, to a number.
        progress: who is told.

    Raises:
        SlimbridgeError: the metric is not a finite number.
    """
    progress = progress or Quiet()
    total = -(-len(source) // BATCH) if isinstance(source, Split) else 0
    progress.start("measuring the metric", total)
    outputs, targets = [], []
    for inputs, wanted in batches(source, BATCH):
        outputs.append(outputs_of(backend, model, inputs))
        targets.append(wanted)
        progress.step()
    found = metric(np.concatenate(outputs), np.concatenate(targets))
    try:
        value = float(found)
    except (TypeError, ValueError) as error:
        raise SlimbridgeError(f"the metric must give a number, found {type(found).__name__}") from error
    if not np.isfinite(value):
        raise SlimbridgeError(f"the metric is {value} over {sum(map(len, targets))} samples; it must be finite")
    return value
