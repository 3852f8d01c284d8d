"""The state of one walk of channel ids over a graph, and what the walk takes for possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slimbridge.graph.ids import IdArray, Ledger
from slimbridge.graph.model import Graph, Node


@dataclass(frozen=True)
class Rules:
    """What a walk takes for possible.

    Attributes:
        freeze_attention: freeze the channels that two activations are multiplied over.
        freeze_reshapes: freeze channels that pass through a reshape or split.
        heads: cut attention into whole heads; everything else is frozen.
        layer_norms: let channels that a LayerNorm normalises go; that is not zeroing them.
    """

    freeze_attention: bool = False
    freeze_reshapes: bool = False
    heads: bool = False
    layer_norms: bool = False


@dataclass(frozen=True)
class Producer:
    """A layer that issued ids: its path, kind ("conv", "grouped", "transposed", "linear"), weight, output ids."""

    layer: str
    kind: str
    weight: str
    ids: IdArray


@dataclass(frozen=True)
class Product:
    """A product of two activations: its node's index, and the ids along each axis of what is multiplied.

    Attributes:
        node: index in the graph.
        sizes: of the output's axes and of the contracted axis, last.
        ids: axis (as in `sizes`) -> ids of its entries, for the axes along which channels lie.
    """

    node: int
    sizes: tuple[int, ...]
    ids: Mapping[int, IdArray]


@dataclass
class Walk:
    """State of one walk.

    Attributes:
        graph, rules: of the walk.
        ids: tensor id -> channel ids.
        ledger: what was said of the ids.
        producers: in order.
        followers: depthwise convolutions, whose outputs go with their inputs, in order.
        constants: tensor ids of constants.
        loose: tensor id -> name, of parameters that are used as they are, outside any layer.
        heads: (layer path, ids of its attention heads), where heads are cut.
        inexact: ids that a LayerNorm normalises.
        products: products of two activations.
        axes: index of a reshape that cuts channels -> the axis that stays one of channels, where it is not the last.
        head_cuts: those of them that cut attention heads.
        parts: indices of slices that together are a split into equal parts.
        at: index of the node that is being walked.
    """

    graph: Graph
    rules: Rules = Rules()
    ids: dict[int, IdArray] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    producers: list[Producer] = field(default_factory=list)
    followers: list[Producer] = field(default_factory=list)
    constants: set[int] = field(default_factory=set)
    loose: dict[int, str] = field(default_factory=dict)
    heads: list[tuple[str, IdArray]] = field(default_factory=list)
    inexact: list[IdArray] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    axes: Mapping[int, int] = field(default_factory=dict)
    head_cuts: frozenset[int] = frozenset()
    parts: frozenset[int] = frozenset()
    at: int = 0

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.graph.shapes[tensor])

    def source(self, node: Node) -> IdArray:
        """Ids of the node's first input."""
        return self.ids[node.inputs[0]]

    def give(self, node: Node, ids: IdArray) -> None:
        """Set the ids of the node's first output."""
        self.ids[node.outputs[0]] = ids

    def give_up(self, node: Node, reason: str) -> None:
        """Freeze all that the node touches."""
        for tensor in node.inputs:
            self.ledger.freeze(self.ids[tensor], reason)
        for tensor in node.outputs:
            self.ids[tensor] = self.ledger.opaque(self.shape(tensor), reason)


def where(node: Node) -> str:
    """`op in layer 'path'`, for reasons that a user reads."""
    return f"'{node.attrs.get('op', node.kind)}' in layer '{node.name}'"
