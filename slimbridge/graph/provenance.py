"""Channel ids through the graph.

Each output channel of a convolution or linear layer gets an id. The graph then runs once on arrays of ids in
place of activations: data movement moves ids, an elementwise operation on two activations unites the ids it
meets, a normalisation carries them and records which of its parameters they touch, a layer consumes ids on its
input axis and issues new ones. What cannot be followed soundly is frozen, with the reason.
"""

from __future__ import annotations

from slimbridge.graph import layer_rules as layers
from slimbridge.graph import move_rules as moves
from slimbridge.graph.cuts import channel_axes, equal_parts
from slimbridge.graph.heads import head_axes
from slimbridge.graph.model import Graph
from slimbridge.graph.walk import Rules, Walk

OUTPUT = "its channels are an output of the model"


def walked(graph: Graph, rules: Rules) -> Walk:
    """Walk the nodes in order and freeze the model's outputs."""
    heads = head_axes(graph) if rules.heads else {}
    walk = Walk(
        graph, rules, axes={**channel_axes(graph), **heads}, head_cuts=frozenset(heads), parts=equal_parts(graph)
    )
    for index, node in enumerate(graph.nodes):
        walk.at = index
        HANDLERS[node.kind](walk, node)
    for output in graph.outputs:
        walk.ledger.freeze(walk.ids[output], OUTPUT)
    return walk


HANDLERS = layers.HANDLERS | moves.HANDLERS
