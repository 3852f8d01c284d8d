"""Proof on one example that a removal is right: it must equal zeroing every removed entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from slimbridge.decisions import PruneDecision
from slimbridge.errors import FAILURES, SlimbridgeError, first_line
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Array, Backend, Model, Pass, as_float64, tensors_in


def zeroed(weights: Mapping[str, Array], decision: PruneDecision) -> dict[str, Array]:
    """The weights with every removed entry 0, except running statistics; arrays that change are copies."""
    result = dict(weights)
    for name, axes in decision.kept.items():
        if name.endswith(("running_mean", "running_var")) or name not in weights:
            continue
        result[name] = weights[name].copy()
        for axis, kept in axes.items():
            gone = np.setdiff1d(np.arange(weights[name].shape[axis]), kept)
            np.moveaxis(result[name], axis, 0)[gone] = 0
    return result


def what_is_wrong(
    backend: Backend, model: Model, pruned: Model, decision: PruneDecision, example: Sequence[Array]
) -> str | None:
    """Run the pruned model beside a copy of the whole one with the removed entries zeroed.

    On the example, and on normal noise of its shape, since an example may hide a difference (a black image does); and
    at drawn weights, since the present ones may hide one too.
    A model that can be trained before must be so after: layers that run in train mode only are seen by nothing else.
    Where a LayerNorm's channels were removed on demand (`decision.exact` is False) there is nothing to compare with.

    Args:
        backend: of both models.
        model: before the removal, left as it is.
        pruned: after it.
        decision: what was removed.
        example: inputs of one forward pass.

    Returns:
        None when they agree, else one line: the error, the shapes, or the difference.
    """
    if not decision.exact:
        return _does_not_run(backend, model, pruned, example)
    weights = backend.read(model)
    changed = zeroed({name: weights[name] for name in decision.kept}, decision)
    del weights  # a model may be as large as the memory allows
    silent = backend.write(backend.clone(model), changed, partial=True)
    del changed
    expected = _outputs(backend, silent, example)
    try:
        wrong = _unlike(_outputs(backend, pruned, example), expected)
        if wrong is None:
            wrong = _unlike_on_noise(backend, silent, pruned, example)
    except SlimbridgeError:
        raise
    except FAILURES as error:
        return f"it does not run: {first_line(error)}"
    if wrong is None:
        wrong = _unlike_at_other_weights(backend, model, silent, pruned, decision, example)
    return wrong or _no_longer_trains(backend, model, pruned, example)


def _unlike_at_other_weights(
    backend: Backend, model: Model, silent: Model, pruned: Model, decision: PruneDecision, example: Sequence[Array]
) -> str | None:
    """The same at drawn weights: a layer that is nearly switched off (a scale of 0, small first weights) hides much.

    `silent` is written over. Nothing is said where the model gives no finite output at such weights.
    """
    drawn = lively(backend.read(model))
    other = backend.clone(pruned)
    try:
        backend.write(silent, zeroed(drawn, decision), partial=True)
        backend.write(other, cut(drawn, decision), partial=True)
        noise = _noise(example)
        expected, found = _outputs(backend, silent, noise), _outputs(backend, other, noise)
    except FAILURES:
        return None  # the model does not take such inputs
    if not all(np.isfinite(array).all() for array in expected if array.dtype.kind == "f"):
        return None
    wrong = _unlike(found, expected)
    return None if wrong is None else f"with other weights {wrong}"


def lively(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Weights under which every layer matters, drawn alike each time; only the floating arrays.

    Matrices and kernels are normal with a deviation of 1.5 / sqrt(fan-in), vectors uniform in 0.3..1.2 (scales that are
    not switched off), running variances in 0.5..1.5.
    """
    random = np.random.default_rng(1)
    drawn = {}
    for name, array in weights.items():
        if array.dtype.kind != "f":
            continue
        if array.ndim >= 2:
            values = random.standard_normal(array.shape) * (1.5 / float(prod(array.shape[1:])) ** 0.5)
        else:
            values = random.uniform(*((0.5, 1.5) if name.endswith("running_var") else (0.3, 1.2)), array.shape)
        drawn[name] = np.asarray(values, array.dtype)
    return drawn


def cut(weights: Mapping[str, Array], decision: PruneDecision) -> dict[str, Array]:
    """The weights without the removed entries."""
    result = dict(weights)
    for name, axes in decision.kept.items():
        for axis, kept in axes.items() if name in weights else ():
            result[name] = np.take(result[name], kept, axis=axis)
    return result


def _does_not_run(backend: Backend, model: Model, pruned: Model, example: Sequence[Array]) -> str | None:
    """All that can be said where removing is not zeroing: it runs, its outputs have their shapes, and it trains."""
    try:
        shapes = [[a.shape for a in _outputs(backend, side, example)] for side in (pruned, model)]
    except SlimbridgeError:
        raise
    except FAILURES as error:
        return f"it does not run: {first_line(error)}"
    if shapes[0] != shapes[1]:
        return f"its outputs have shapes {shapes[0]}, before {shapes[1]}"
    return _no_longer_trains(backend, model, pruned, example)


def _unlike_on_noise(backend: Backend, silent: Model, pruned: Model, example: Sequence[Array]) -> str | None:
    noise = _noise(example)
    try:
        expected = _outputs(backend, silent, noise)
    except FAILURES:
        return None  # the model does not take such inputs
    return _unlike(_outputs(backend, pruned, noise), expected)


def _noise(example: Sequence[Array]) -> list[Array]:
    random = np.random.default_rng(0)
    return [random.standard_normal(a.shape).astype(a.dtype) if a.dtype.kind == "f" else a for a in example]


def _unlike(found: list[Array], expected: list[Array]) -> str | None:
    shapes = [array.shape for array in found], [array.shape for array in expected]
    if shapes[0] != shapes[1]:
        return f"its outputs have shapes {shapes[0]}, before {shapes[1]}"
    difference = max((largest_share(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    if not difference <= tolerance("removal_check").value:
        return f"its output differs from that with the channels zeroed by {difference:.2g} (relative)"
    return None


def largest_share(found: Array, expected: Array) -> float:
    """Largest difference of an entry, as a share of its size plus that of a small entry (the lower quartile).

    Each entry counts by itself, so that a few huge ones hide nothing. Entries that are not finite must be equal.
    """
    a, b = as_float64(found), as_float64(expected)
    finite = np.isfinite(b)
    if not np.array_equal(np.where(finite, 0.0, a), np.where(finite, 0.0, b), equal_nan=True):
        return float("inf")
    a, b = a[finite], b[finite]
    sizes = np.abs(b[b != 0])
    if not sizes.size:
        return float(np.abs(a).max(initial=0.0))
    return float((np.abs(a - b) / (np.abs(b) + np.quantile(sizes, 0.25))).max(initial=0.0))


def _no_longer_trains(backend: Backend, model: Model, pruned: Model, example: Sequence[Array]) -> str | None:
    def loss(result: Pass) -> dict[str, Any]:
        return {"mean": backend.ops.mean(tensors_in(result.output)[0])}

    try:
        backend.gradients(pruned, example, loss, train=True)
    except FAILURES as error:
        failure = first_line(error)
    except SlimbridgeError as error:
        failure = first_line(error)
    else:
        return None
    try:
        backend.gradients(model, example, loss, train=True)
    except (*FAILURES, SlimbridgeError):
        return None  # nor did it before: it needs a loss or inputs of its own
    return f"it does not run in train mode: {failure}"


def _outputs(backend: Backend, model: Model, example: Sequence[Array]) -> list[Array]:
    backend.seed(0)  # a model that is random in eval mode draws the same numbers each time
    return [backend.ops.numpy(tensor) for tensor in tensors_in(backend.forward(model, example).output)]
