"""Which reshapes cut channels into attention heads: those whose pieces are later multiplied side by side."""

from __future__ import annotations

from collections import defaultdict

from slimbridge.graph.model import Graph, Node
from slimbridge.graph.reshapes import axis_map

_KEEPS = frozenset(("elementwise", "binary", "softmax", "layer_norm", "expand"))


def readers_of(graph: Graph) -> dict[int, list[int]]:
    """Tensor -> indices of the nodes that read it."""
    readers: dict[int, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        for tensor in node.inputs:
            readers[tensor].append(index)
    return readers


def head_axes(graph: Graph) -> dict[int, int]:
    """Index of each reshape that cuts an axis into heads -> the axis of the heads after it.

    An axis is one of heads if a product of two activations has it as a batch axis: (..., heads, tokens, size).
    """
    readers = readers_of(graph)
    found = {}
    for index, node in enumerate(graph.nodes):
        if node.kind != "reshape":
            continue
        old, new = graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]
        for before, after in axis_map(old, new):
            heads = [axis for axis in after if len(before) == 1 < len(after) and _batch(graph, readers, node, axis)]
            if len(heads) == 1:
                found[index] = heads[0]
    return found


def _batch(graph: Graph, readers: dict[int, list[int]], node: Node, axis: int) -> bool:
    """Does the axis of the node's output become a batch axis of a product?"""
    waiting, seen = [(node.outputs[0], axis)], set()
    while waiting:
        place = waiting.pop()
        if place in seen:
            continue
        seen.add(place)
        tensor, at = place
        for index in readers[tensor]:
            reader = graph.nodes[index]
            if reader.kind == "matmul":
                if at < len(graph.shapes[tensor]) - 2:
                    return True
                continue
            for output in reader.outputs:
                moved = follow(graph, reader, tensor, output, at)
                if moved is not None:
                    waiting.append((output, moved))
    return False


def follow(graph: Graph, node: Node, tensor: int, output: int, at: int) -> int | None:
    """The axis after the node, None where it is cut, joined or lost."""
    old, new = graph.shapes[tensor], graph.shapes[output]
    if node.kind == "transpose":
        return tuple(node.attrs["perm"]).index(at)
    if node.kind in _KEEPS:
        moved = at + len(new) - len(old)
        return moved if new[moved] == old[at] else None
    if node.kind in ("split", "slice", "concat"):
        return at if len(old) == len(new) and int(node.attrs["axis"]) != at else None
    if node.kind == "reshape":
        kept = [after[0] for before, after in axis_map(old, new) if before == (at,) and len(after) == 1]
        return kept[0] if kept else None
    return None
