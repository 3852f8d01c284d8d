"""Where channels are cut into blocks, by what later becomes of the pieces: spatial blocks, equal slices."""

from __future__ import annotations

from collections import defaultdict

from slimbridge.graph.heads import follow, readers_of
from slimbridge.graph.model import Graph, Node
from slimbridge.graph.reshapes import axis_map


def channel_axes(graph: Graph) -> dict[int, int]:
    """Index of each reshape that cuts an axis into channels and pieces of space -> the channels' axis after it.

    A pixel shuffle is one: (n, c r r, h, w) becomes (n, c, r, r, h, w), and r is later joined to h and to w. What is
    left of the cut axis is its last piece that is not so joined; where none is joined the reshape is not listed.
    """
    readers = readers_of(graph)
    found = {}
    for index, node in enumerate(graph.nodes):
        if node.kind != "reshape":
            continue
        for before, after in axis_map(graph.shapes[node.inputs[0]], graph.shapes[node.outputs[0]]):
            if len(before) == 1 < len(after):
                joined = _joined_to_others(graph, readers, node, after)
                left = [axis for axis in after if axis not in joined]
                if joined and left:
                    found[index] = left[-1]
    return found


def _joined_to_others(graph: Graph, readers: dict[int, list[int]], node: Node, pieces: tuple[int, ...]) -> set[int]:
    """The pieces of a cut axis that a later reshape joins to an axis that is none of them."""
    joined: set[int] = set()
    waiting = [(node.outputs[0], {piece: piece for piece in pieces})]
    seen = set()
    while waiting:
        tensor, places = waiting.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        for index in readers[tensor]:
            reader = graph.nodes[index]
            if reader.kind == "reshape":
                old, new = graph.shapes[tensor], graph.shapes[reader.outputs[0]]
                for before, after in axis_map(old, new):
                    held = {piece for piece, place in places.items() if place in before}
                    if len(after) == 1 < len(before) and len(held) < len(before):
                        joined |= held
                continue
            for output in reader.outputs:
                moved = {piece: follow(graph, reader, tensor, output, place) for piece, place in places.items()}
                kept = {piece: place for piece, place in moved.items() if place is not None}
                if len(kept) == len(places):
                    waiting.append((output, kept))
    return joined


def equal_parts(graph: Graph) -> frozenset[int]:
    """Indices of slices that, with others of one tensor, cut a whole axis into parts of one size, as a split does."""
    cuts: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        if node.kind == "slice" and node.attrs.get("step", 1) == 1:
            cuts[node.inputs[0], int(node.attrs["axis"])].append(index)
    found: set[int] = set()
    for (tensor, axis), members in cuts.items():
        spans = {(graph.nodes[i].attrs["start"], graph.nodes[i].attrs["stop"]) for i in members}
        size = min(stop - start for start, stop in spans)
        whole = graph.shapes[tensor][axis]
        if size and len(spans) > 1 and spans == {(start, start + size) for start in range(0, whole, size)}:
            found.update(members)
    return frozenset(found)
