"""Cost from the neutral graph: multiply-accumulates and parameters, counted one way for every framework."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from slimbridge.graph.model import Graph, Node
from slimbridge.graph.units import Units

STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Cost:
    """Cost of one forward pass of one sample.

    Attributes:
        macs: multiply-accumulates of convolutions, linear layers and matrix products; a bias, a normalisation or
            an activation counts nothing.
        parameters: entries of all parameters and buffers but BatchNorm's running statistics.
        by_layer: layer path -> MACs, in execution order; empty where only the sums were asked for.
    """

    macs: int
    parameters: int
    by_layer: Mapping[str, int] = field(default_factory=dict)


def count_parameters(shapes: Mapping[str, Iterable[int]]) -> int:
    """Entries of all named arrays but the running statistics."""
    return sum(prod(shape) for name, shape in shapes.items() if not name.endswith(STATISTICS))


def cost_of(graph: Graph) -> Cost:
    """Count a graph; its first input's first axis is the batch."""
    by_layer: dict[str, int] = {}
    for node in graph.nodes:
        macs = _macs(graph, node, graph.parameters) // _batch(graph)
        if macs:
            by_layer[node.name] = by_layer.get(node.name, 0) + macs
    return Cost(sum(by_layer.values()), count_parameters(graph.parameters), by_layer)


def cost_without(graph: Graph, units: Units, removed: Collection[int]) -> Cost:
    """The cost that is left when units are removed, without removing them; without `by_layer`."""
    stays = units.stays(removed)
    shapes = {name: list(shape) for name, shape in graph.parameters.items()}
    for (name, axis), along in units.touched.items():
        shapes[name][axis] = int(stays[along].sum())
    macs = 0
    for index, node in enumerate(graph.nodes):
        if index in units.products:
            sizes, channels = units.products[index]
            left = [int(stays[channels[axis]].sum()) if axis in channels else size for axis, size in enumerate(sizes)]
            macs += prod(left) // _batch(graph)
        else:
            macs += _macs(graph, node, shapes) // _batch(graph)
    return Cost(macs, count_parameters(shapes))


def _batch(graph: Graph) -> int:
    return max(graph.shapes[graph.inputs[0]][0], 1) if graph.inputs and graph.shapes[graph.inputs[0]] else 1


def _macs(graph: Graph, node: Node, shapes: Mapping[str, Sequence[int]]) -> int:
    """Of the whole batch; `shapes` are those of the parameters, possibly smaller than in the graph."""
    if node.kind in ("conv", "linear"):
        weight = shapes[node.params["weight"]]
        transposed = bool(node.attrs.get("transposed", False))
        places = graph.shapes[node.inputs[0] if transposed else node.outputs[0]]
        axis = 1 if node.kind == "conv" else len(places) - 1
        return prod(places) // max(places[axis], 1) * prod(weight)
    if node.kind == "matmul":
        return prod(graph.shapes[node.outputs[0]]) * graph.shapes[node.inputs[0]][-1]
    return 0
