"""Cost from the neutral graph: multiply-accumulates and parameters, counted one way for every framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from slimbridge.graph.model import Graph, Node

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one sample.

    Attributes:
        macs: multiply-accumulates of convolutions, linear layers and matrix products; a bias, a normalisation or
            an activation counts nothing.
        parameters: entries of all parameters and buffers but BatchNorm's running statistics.
        by_layer: layer path -> MACs, in execution order.
    """

    macs: int
    parameters: int
    by_layer: Mapping[str, int]


def count_parameters(shapes: Mapping[str, Iterable[int]]) -> int:
    """Entries of all named arrays but the running statistics."""
    return sum(prod(shape) for name, shape in shapes.items() if not name.endswith(STATISTICS))


def cost_of(graph: Graph) -> Cost:
    """Count a graph; its first input's first axis is the batch."""
    batch = graph.shapes[graph.inputs[0]][0] if graph.inputs and graph.shapes[graph.inputs[0]] else 1
    by_layer: dict[str, int] = {}
    for node in graph.nodes:
        macs = _macs(graph, node) // max(batch, 1)
        if macs:
            by_layer[node.name] = by_layer.get(node.name, 0) + macs
    return Cost(sum(by_layer.values()), count_parameters(graph.parameters), by_layer)


def _macs(graph: Graph, node: Node) -> int:
    if node.kind in ("conv", "linear"):
        return prod(graph.shapes[node.outputs[0]]) * prod(graph.parameters[node.params["weight"]][1:])
    if node.kind == "matmul":
        return prod(graph.shapes[node.outputs[0]]) * graph.shapes[node.inputs[0]][-1]
    return 0
