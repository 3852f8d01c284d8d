"""What importances need beside the weights: gradients and activations over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit

from slimbridge.errors import ModelError
from slimbridge.graph import Graph, Node
from slimbridge.ports import Array, Backend, Loss, Model, as_float64

Batches = Iterable[tuple[tuple[Array, ...], Array]]
Objective = Callable[[tuple[Array, ...], Array], Loss]
Function = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Evidence:
    """Collected over the calibration batches; empty mappings where an importance needs nothing.

    Attributes:
        gradients: parameter -> mean gradient of the loss, canonical shape.
        squared_gradients: parameter -> mean over the batches of the squared gradient, canonical shape.
        activations: producer's layer path -> {"mean", "apoz"} of each output channel, shape (out,), after the
            normalisation and activation that follow it.
    """

    gradients: Mapping[str, Array] = field(default_factory=dict)
    squared_gradients: Mapping[str, Array] = field(default_factory=dict)
    activations: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)


def collect(
    backend: Backend, model: Model, graph: Graph, needs: str, batches: Batches, objective: Objective
) -> Evidence:
    """Collect what an importance needs; the model is left as it was, and runs in eval mode.

    Args:
        backend: of the model.
        model: traced as `graph`.
        graph: finds what follows a layer.
        needs: see `slimbridge.plan.registries.Importance`; "weights" collects nothing.
        batches: (inputs, labels).
        objective: (inputs, labels) -> the loss of that batch, a mean over its samples.

    Raises:
        ModelError: there is no batch, or a loss is not finite.
    """
    if needs == "weights":
        return Evidence()
    if needs == "activations":
        return Evidence(activations=_activations(backend, model, graph, batches))
    squared = needs == "squared_gradients"
    total: dict[str, NDArray[np.float64]] = {}
    count = 0
    for inputs, labels in batches:
        for name, gradient in backend.gradients(model, inputs, objective(inputs, labels)).items():
            exact = as_float64(gradient)
            total[name] = total.get(name, np.zeros(exact.shape)) + (np.square(exact) if squared else exact)
        count += 1
    _check_batches(count, needs)
    means = {name: array / count for name, array in total.items()}
    return Evidence(squared_gradients=means) if squared else Evidence(gradients=means)


def _check_batches(count: int, needs: str) -> None:
    if count == 0:
        raise ModelError(f"an importance that needs {needs.replace('_', ' ')} needs calibration data: found no batch")


ACTIVATIONS: Mapping[str, Function] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "tanh": np.tanh,
    "sigmoid": expit,
    "silu": lambda x: x * expit(x),
    "swish": lambda x: x * expit(x),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
}
"""Activation functions that need no number but their input, with the frameworks' defaults; others are passed over."""


@dataclass(frozen=True)
class Probe:
    """Where a layer's activations are seen.

    Attributes:
        layer: path of the layer that makes the channels.
        captured: path of the layer whose output is taken: it, or the BatchNorm directly behind it.
        axis: of the channels in that output.
        function: the activation function that follows.
    """

    layer: str
    captured: str
    axis: int
    function: Function


def probes(graph: Graph) -> tuple[Probe, ...]:
    """One probe for each convolution and linear layer; of a layer that runs several times its last run is seen.

    A module that does more behind its convolution, and gives other channels, cannot be looked into: it has none.
    """
    readers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            readers.setdefault(tensor, []).append(node)
    last = {node.name: node for node in graph.nodes}
    found: dict[str, Probe] = {}
    for node in graph.layer_nodes():
        end, captured = last[node.name], node.name
        norm = _only_reader(graph, readers, end, "batch_norm")
        if norm is not None and last[norm.name] is norm:
            end, captured = norm, norm.name
        activation = _only_reader(graph, readers, end, "elementwise")
        function = ACTIVATIONS.get(str(activation.attrs.get("op"))) if activation else None
        made, seen = graph.shapes[node.outputs[0]], graph.shapes[end.outputs[0]]
        axis = 1 if node.kind == "conv" else len(made) - 1
        if len(made) != len(seen) or made[axis] != seen[axis]:
            continue
        found[node.name] = Probe(node.name, captured, axis, function or (lambda x: x))
    return tuple(found.values())


def _only_reader(graph: Graph, readers: Mapping[int, list[Node]], node: Node, kind: str) -> Node | None:
    """The node that alone reads this one's output, when it is of that kind."""
    tensor = node.outputs[0]
    found = readers.get(tensor, [])
    alone = len(found) == 1 and tensor not in graph.outputs
    return found[0] if alone and found[0].kind == kind else None


def _activations(backend: Backend, model: Model, graph: Graph, batches: Batches) -> dict[str, dict[str, Array]]:
    wanted = probes(graph)
    sums: dict[str, NDArray[np.float64]] = {}
    sizes: dict[str, int] = {}
    count = 0
    for inputs, _ in batches:
        features = backend.forward(model, inputs, tuple({probe.captured: None for probe in wanted})).features
        for probe in wanted:
            seen = np.moveaxis(backend.ops.numpy(features[probe.captured]), probe.axis, 0)
            values = probe.function(seen.reshape(seen.shape[0], -1))
            both = np.stack([np.abs(values).sum(axis=1, dtype=np.float64), (values == 0).sum(axis=1)])
            sums[probe.layer] = sums.get(probe.layer, np.zeros(both.shape)) + both
            sizes[probe.layer] = sizes.get(probe.layer, 0) + values.shape[1]
        count += 1
    _check_batches(count, "activations")
    return {
        layer: {"mean": total[0] / max(sizes[layer], 1), "apoz": total[1] / max(sizes[layer], 1)}
        for layer, total in sums.items()
    }
