"""A fake quantization run on a backend: its output, its gradients, and what it changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from slimbridge.ports import Array, Backend, Device, DType, FakeQuant, Pass


class Ran(NamedTuple):
    """What came of it; gradients are those of sum(slope * output), of "x" and of the parameters and reads."""

    output: Array
    gradients: dict[str, Array]
    changed: dict[str, Array]


def run(
    backend: Backend,
    device: Device,
    quant: FakeQuant,
    x: Array,
    values: Mapping[str, Array] | None = None,
    slope: Array | None = None,
    training: bool = True,
    dtype: DType = "float64",
) -> Ran:
    """The fake quantization of `x`; its state is its own initial one but for `values`."""
    state = {**quant.parameters, **quant.buffers, **(values or {})}
    trained = {"x": x, **{name: state[name] for name in (*quant.parameters, *quant.reads)}}
    model = backend.place(holder(backend, trained), device, dtype)
    model = backend.write(model, {name: np.asarray(value, dtype) for name, value in trained.items()})
    found: dict[str, Any] = {}

    def loss(result: Pass) -> dict[str, Any]:
        natives = {name: result.parameters[name] for name in trained}
        natives.update({name: backend.tensor(model, np.asarray(state[name], dtype)) for name in quant.buffers})
        output, changed = quant(backend.ops, natives.pop("x"), natives, training)
        weights = backend.tensor(model, np.ones(x.shape) if slope is None else slope)
        found["output"] = backend.ops.numpy(output)
        found["changed"] = {name: backend.ops.numpy(value) for name, value in changed.items()}
        return {"loss": backend.ops.sum(output * weights)}

    gradients = backend.gradients(model, [np.zeros((1, 1), np.float32)], loss)
    return Ran(found["output"], gradients, found["changed"])


def holder(backend: Backend, arrays: Mapping[str, Array]) -> Any:
    """A model of nothing but parameters."""

    class Holder(backend.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            for name, array in arrays.items():
                setattr(self, name, backend.nn.parameter(array))

        def forward(self, x: Any) -> Any:
            return x

    return Holder()
