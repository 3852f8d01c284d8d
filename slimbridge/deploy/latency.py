"""Latency: the median time of one forward pass in the model's own framework."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.report.records import LatencyRecord

WARMUP = 5
RUNS = 40


def measure_latency(
    backend: Backend, model: Model, example: Sequence[Array], device: str, simulated: bool = False
) -> LatencyRecord:
    """Time forward passes on one example; fetching the output ends each, so that a device's queue is counted.

    Args:
        backend: the model's backend.
        model: run in eval mode.
        example: inputs of one pass, the batch on the first axis.
        device: where the model is.
        simulated: the model computes quantized values in float; the record says so.
    """
    inputs = [backend.tensor(model, array) for array in example]
    seconds = []
    for _ in range(WARMUP + RUNS):
        started = time.perf_counter()
        backend.ops.numpy(tensors_in(backend.forward(model, inputs).output)[0])
        seconds.append(time.perf_counter() - started)
    low, median, high = np.percentile(np.array(seconds[WARMUP:]) * 1000, [25, 50, 75])
    capabilities = backend.capabilities()
    version = next(iter(capabilities.versions.values()), "")
    number_format = "simulated integers (computed in float32)" if simulated else "float32"
    return LatencyRecord(
        median_ms=round(float(median), 4),
        spread_ms=round(float(high - low), 4),
        runs=RUNS,
        batch=int(example[0].shape[0]),
        threads=capabilities.threads,
        how=f"{backend.name} {version} eager, {number_format}, {device}",
    )
