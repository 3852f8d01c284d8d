"""Proof on one example that a removal is right: it must equal zeroing every removed entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from slimbridge.decisions import PruneDecision
from slimbridge.errors import SlimbridgeError
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Array, Backend, Model, tensors_in


def zeroed(weights: Mapping[str, Array], decision: PruneDecision) -> dict[str, Array]:
    """Copies of the weights with every removed entry 0, except running statistics."""
    result = {name: array.copy() for name, array in weights.items()}
    for name, axes in decision.kept.items():
        if name.endswith(("running_mean", "running_var")):
            continue
        for axis, kept in axes.items():
            gone = np.setdiff1d(np.arange(weights[name].shape[axis]), kept)
            np.moveaxis(result[name], axis, 0)[gone] = 0
    return result


def what_is_wrong(
    backend: Backend, model: Model, pruned: Model, decision: PruneDecision, example: Sequence[Array]
) -> str | None:
    """Run the pruned model beside a copy of the whole one with the removed entries zeroed.

    Args:
        backend: of both models.
        model: before the removal, left as it is.
        pruned: after it.
        decision: what was removed.
        example: inputs of one forward pass.

    Returns:
        None when they agree, else one line: the error, the shapes, or the difference.
    """
    silent = backend.write(backend.clone(model), zeroed(backend.read(model), decision))
    expected = _outputs(backend, silent, example)
    try:
        found = _outputs(backend, pruned, example)
    except SlimbridgeError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"it does not run: {lines[0]}"
    shapes = [array.shape for array in found], [array.shape for array in expected]
    if shapes[0] != shapes[1]:
        return f"its outputs have shapes {shapes[0]}, before {shapes[1]}"
    difference = max((relative(a, b) for a, b in zip(found, expected, strict=True)), default=0.0)
    if not difference <= tolerance("removal_check").value:
        return f"its output differs from that with the channels zeroed by {difference:.2g} (relative)"
    return None


def _outputs(backend: Backend, model: Model, example: Sequence[Array]) -> list[Array]:
    return [backend.ops.numpy(tensor) for tensor in tensors_in(backend.forward(model, example).output)]
