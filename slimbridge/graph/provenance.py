"""Channel ids through the graph: one handler for each kind of node.

Each output channel of a convolution or linear layer gets an id. The graph then runs once on arrays of ids in
place of activations: data movement moves ids, an elementwise operation on two activations unites the ids it
meets, a normalisation carries them and records which of its parameters they touch, a layer consumes ids on its
input axis and issues new ones. What cannot be followed soundly is frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np

from slimbridge.graph.heads import head_axes
from slimbridge.graph.ids import IdArray, Ledger, along, first_along, same_shape_axes, spread, thin, varies
from slimbridge.graph.model import Graph, Node
from slimbridge.graph.reshapes import axis_map


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
        constants: tensor ids of constants.
        loose: tensor id -> name, of parameters that are used as they are, outside any layer.
        heads: (layer path, ids of its attention heads), where heads are cut.
        inexact: ids that a LayerNorm normalises.
        products: products of two activations.
        axes: index of a reshape that cuts attention heads -> their axis after it.
        at: index of the node that is being walked.
    """

    graph: Graph
    rules: Rules = Rules()
    ids: dict[int, IdArray] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    producers: list[Producer] = field(default_factory=list)
    constants: set[int] = field(default_factory=set)
    loose: dict[int, str] = field(default_factory=dict)
    heads: list[tuple[str, IdArray]] = field(default_factory=list)
    inexact: list[IdArray] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    axes: Mapping[int, int] = field(default_factory=dict)
    at: int = 0

    def run(self) -> Walk:
        """Walk the nodes in order and freeze the model's outputs."""
        if self.rules.heads:
            self.axes = head_axes(self.graph)
        for index, node in enumerate(self.graph.nodes):
            self.at = index
            HANDLERS[node.kind](self, node)
        for output in self.graph.outputs:
            self.ledger.freeze(self.ids[output], "its channels are an output of the model")
        return self

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


def _input(walk: Walk, node: Node) -> None:
    walk.give(node, walk.ledger.opaque(walk.shape(node.outputs[0]), "it reads an input of the model"))


def _constant(walk: Walk, node: Node) -> None:
    """A parameter with one axis of more than one entry has channels of its own; any other constant is opaque."""
    tensor = node.outputs[0]
    shape = walk.shape(tensor)
    walk.constants.add(tensor)
    name = node.params.get("value")
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    if name is not None:
        walk.loose[tensor] = name
    if name is None or len(wide) != 1 or walk.graph.parameters.get(name) != shape:
        walk.give(node, walk.ledger.opaque(shape, "it meets a constant of its own size"))
        return
    ids = walk.ledger.issue(shape[wide[0]])
    walk.ledger.touch(name, wide[0], ids)
    walk.give(node, spread(ids.reshape([size if axis == wide[0] else 1 for axis, size in enumerate(shape)]), shape))


def _unknown(walk: Walk, node: Node) -> None:
    walk.give_up(node, f"the tracer does not know {where(node)}")


def _matmul(walk: Walk, node: Node) -> None:
    """Unite along the contracted axis; what varies along the other axes goes on, united where both sides have it."""
    left, right = (walk.ids[tensor] for tensor in node.inputs)
    shape = walk.shape(node.outputs[0])
    vector = left.ndim < 2 or right.ndim < 2
    if vector or walk.rules.freeze_attention or _mixed(left, left.ndim - 1) or _mixed(right, right.ndim - 2):
        walk.give_up(node, f"two activations are multiplied by {where(node)}")
        return
    inner = varies(left, left.ndim - 1), varies(right, right.ndim - 2)
    if any(inner):
        a, b = first_along(left, left.ndim - 2), first_along(right, right.ndim - 1).swapaxes(-1, -2)
        walk.ledger.unite(a, b)
    walk.products.append(_product(walk.at, left, right, shape))
    passed = []
    for ids, axis, consumed in ((left, left.ndim - 1, inner[0]), (right, right.ndim - 2, inner[1])):
        if consumed:
            continue
        if any(varies(ids, a) for a in range(ids.ndim)):
            passed.append(first_along(ids, axis))
        else:
            walk.ledger.freeze(ids, f"it is multiplied by another activation in {where(node)}")
    if not passed:
        walk.give(node, spread(walk.ledger.issue(1).reshape([1] * len(shape)), shape))
        return
    if len(passed) == 2:
        walk.ledger.unite(*passed)
    met = np.broadcast_arrays(*(thin(ids) for ids in passed))[0] if len(passed) == 2 else passed[0]
    walk.give(node, spread(met, shape))


def _mixed(ids: IdArray, axis: int) -> bool:
    """Do ids vary along this axis and along another too?"""
    return varies(ids, axis) and any(varies(ids, other) for other in range(ids.ndim) if other != axis)


def _product(at: int, left: IdArray, right: IdArray, shape: tuple[int, ...]) -> Product:
    rank = len(shape)
    sources = {**{axis: (left, axis - rank) for axis in range(rank - 1)}, rank - 1: (right, -1), rank: (left, -1)}
    found = {}
    for axis, (ids, place) in sources.items():
        place += ids.ndim
        channels = along(ids, place) if place >= 0 and varies(ids, place) else None
        if channels is not None:
            found[axis] = channels
    return Product(at, (*shape, left.shape[-1]), found)


def _same(walk: Walk, node: Node) -> None:
    walk.give(node, walk.source(node))


def _frozen(walk: Walk, node: Node) -> None:
    walk.ledger.freeze(walk.source(node), f"removing channels before {where(node)} is not zeroing them")
    _same(walk, node)


def _layer_norm(walk: Walk, node: Node) -> None:
    ids, axes = walk.source(node), tuple(node.attrs["axes"])
    channels = along(ids, axes[0]) if len(axes) == 1 else None
    if not any(varies(ids, axis) for axis in axes):
        _same(walk, node)
    elif not walk.rules.layer_norms or channels is None:
        _frozen(walk, node)
    else:
        for name in node.params.values():
            walk.ledger.touch(name, 0, channels)
        walk.inexact.append(channels)
        _same(walk, node)


def _group_norm(walk: Walk, node: Node) -> None:
    """Whole groups go: the statistics of one group do not depend on another."""
    channels, groups = along(walk.source(node), 1), int(node.attrs["groups"])
    if channels is None or groups == 1:
        _frozen(walk, node)
        return
    blocks = channels.reshape(groups, -1)
    walk.ledger.unite(blocks[:, :1], blocks)
    for name in node.params.values():
        walk.ledger.touch(name, 0, channels)
    _same(walk, node)


def _batch_norm(walk: Walk, node: Node) -> None:
    channels = along(walk.source(node), 1)
    if channels is None:
        walk.give_up(node, f"channels cannot be followed through {where(node)}")
        return
    for name in node.params.values():
        walk.ledger.touch(name, 0, channels)
    _same(walk, node)


def _issue(walk: Walk, node: Node, axis: int, kind: str) -> IdArray:
    """New ids for the node's output channels, spread over its output tensor."""
    ids = walk.ledger.issue(walk.shape(node.outputs[0])[axis])
    walk.producers.append(Producer(node.name, kind, node.params["weight"], ids))
    if "bias" in node.params:
        walk.ledger.touch(node.params["bias"], 0, ids)
    view = [1] * len(walk.shape(node.outputs[0]))
    view[axis] = ids.size
    walk.give(node, spread(ids.reshape(view), walk.shape(node.outputs[0])))
    return ids


def _conv(walk: Walk, node: Node) -> None:
    groups = int(node.attrs.get("groups", 1))
    channels = along(walk.source(node), 1)
    if channels is None:
        walk.ledger.freeze(walk.source(node), f"channels cannot be followed into {where(node)}")
        channels = np.array(walk.ledger.opaque((walk.shape(node.inputs[0])[1],), "its inputs are frozen"))
    if groups > 1 and groups == channels.size:
        _depthwise(walk, node, channels)
    elif node.attrs.get("transposed", False):
        _transposed(walk, node, channels, groups)
    else:
        weight = node.params["weight"]
        blocks = channels.reshape(groups, -1)
        walk.ledger.unite(blocks[:1], blocks)
        walk.ledger.touch(weight, 1, blocks[0])
        issued = _issue(walk, node, 1, "grouped" if groups > 1 else "conv")
        walk.ledger.touch(weight, 0, issued)
        by_group = issued.reshape(groups, -1)
        walk.ledger.unite(by_group[:1], by_group)


def _depthwise(walk: Walk, node: Node, channels: IdArray) -> None:
    """Each input channel has outputs of its own; they go with it."""
    shape = walk.shape(node.outputs[0])
    carried = np.repeat(channels, shape[1] // channels.size)
    walk.ledger.touch(node.params["weight"], 0, channels if node.attrs.get("transposed", False) else carried)
    if "bias" in node.params:
        walk.ledger.touch(node.params["bias"], 0, carried)
    walk.give(node, spread(carried.reshape([1, carried.size] + [1] * (len(shape) - 2)), shape))


def _transposed(walk: Walk, node: Node, channels: IdArray, groups: int) -> None:
    """A transposed convolution's weight is (in, out / groups, ...): the groups shrink alike on both sides."""
    weight = node.params["weight"]
    blocks = channels.reshape(groups, -1)
    walk.ledger.unite(blocks[:1], blocks)
    walk.ledger.touch(weight, 0, channels)
    issued = _issue(walk, node, 1, "transposed").reshape(groups, -1)
    walk.ledger.unite(issued[:1], issued)
    walk.ledger.touch(weight, 1, issued[0])


def _linear(walk: Walk, node: Node) -> None:
    ids = walk.source(node)
    channels = along(ids, ids.ndim - 1)
    if channels is None:
        reason = f"the linear layer '{node.name}' works along another axis than the channels"
        walk.ledger.freeze(ids, reason)
        channels = np.array(walk.ledger.opaque((ids.shape[-1],), reason))
    walk.ledger.touch(node.params["weight"], 1, channels)
    walk.ledger.touch(node.params["weight"], 0, _issue(walk, node, len(walk.shape(node.outputs[0])) - 1, "linear"))


def _binary(walk: Walk, node: Node) -> None:
    """Unite what meets; a map of one channel times a tensor of many stays apart, and must stay."""
    shape = walk.shape(node.outputs[0])
    left, right = (_aligned(walk.ids[tensor], len(shape)) for tensor in node.inputs)
    scalars = [tensor in walk.constants and prod(walk.shape(tensor)) == 1 for tensor in node.inputs]
    if any(scalars):
        walk.give(node, spread(right if scalars[0] else left, shape))
        return
    loose = [tensor in walk.loose for tensor in node.inputs]
    if any(loose) and not all(loose) and _meets_parameter(walk, node, loose.index(True), (left, right)):
        return
    narrow = [_is_broadcast_over_channels(a, b) for a, b in ((left, right), (right, left))]
    if any(narrow):
        one, many = (left, right) if narrow[0] else (right, left)
        walk.ledger.freeze(one, f"one map is broadcast over many channels by {where(node)}")
        if all(narrow):
            walk.give_up(node, f"two tensors are broadcast over each other by {where(node)}")
        else:
            walk.give(node, spread(many, shape))
        return
    walk.ledger.unite(left, right)
    met, _ = np.broadcast_arrays(thin(left), thin(right))
    walk.give(node, spread(met, shape))


def _meets_parameter(walk: Walk, node: Node, side: int, both: tuple[IdArray, IdArray]) -> bool:
    """A parameter outside any layer meets an activation's channels: its entries go with them. False: not so simple.

    Zeroed entries must stay zero by the operation, as they do for sums and products.
    """
    own, other = both[side], both[1 - side]
    if node.attrs.get("op") not in ("add", "sub", "mul", "prelu"):
        walk.ledger.freeze(own, f"a parameter takes part in {where(node)}")
        return False
    axes = [axis for axis in range(other.ndim) if varies(other, axis)]
    if len(axes) != 1 or own.shape[axes[0]] != other.shape[axes[0]] or varies(own, axes[0]):
        return False  # one axis of channels on either side is united as two activations are
    name = walk.loose[node.inputs[side]]
    axis = axes[0] - (other.ndim - len(walk.shape(node.inputs[side])))
    channels = along(other, axes[0])
    if channels is None or walk.graph.parameters.get(name) != walk.shape(node.inputs[side]):
        return False
    walk.ledger.touch(name, axis, channels)
    walk.give(node, spread(other, walk.shape(node.outputs[0])))
    return True


def _aligned(ids: IdArray, ndim: int) -> IdArray:
    return ids.reshape([1] * (ndim - ids.ndim) + list(ids.shape)) if ids.ndim < ndim else ids


def _is_broadcast_over_channels(one: IdArray, many: IdArray) -> bool:
    return any(one.shape[axis] == 1 < many.shape[axis] and varies(many, axis) for axis in range(many.ndim))


def _concat(walk: Walk, node: Node) -> None:
    axis, shape = int(node.attrs["axis"]), walk.shape(node.outputs[0])
    parts = [walk.ids[tensor] for tensor in node.inputs]
    if any(varies(part, a) for part in parts for a in range(len(shape)) if a != axis):
        _join_beside(walk, node, parts, axis)
        return
    flat = [all(part.strides[a] == 0 or part.shape[a] == 1 for part in parts) for a in range(len(shape))]
    cut = tuple(slice(0, 1) if flat[a] and a != axis else slice(None) for a in range(len(shape)))
    walk.give(node, spread(np.concatenate([part[cut] for part in parts], axis=axis), shape))


def _join_beside(walk: Walk, node: Node, parts: list[IdArray], axis: int) -> None:
    """Tensors joined along another axis than their channels: the channels at one position are one."""
    if any(varies(part, axis) for part in parts):
        walk.give_up(node, f"channels lie along two axes in {where(node)}")
        return
    first = first_along(parts[0], axis)
    for part in parts[1:]:
        walk.ledger.unite(first, first_along(part, axis))
    walk.give(node, spread(first, walk.shape(node.outputs[0])))


def _split(walk: Walk, node: Node) -> None:
    axis, sizes, ids = int(node.attrs["axis"]), tuple(node.attrs["sizes"]), walk.source(node)
    blocks = np.split(ids, np.cumsum(sizes)[:-1], axis=axis)
    if varies(ids, axis):
        if len(set(sizes)) > 1 or walk.rules.freeze_reshapes:
            walk.ledger.freeze(ids, f"its channels are cut at written places by {where(node)}")
        else:
            for block in blocks[1:]:
                walk.ledger.unite(blocks[0], block)
            blocks = [blocks[0]] * len(blocks)
    for tensor, block in zip(node.outputs, blocks, strict=True):
        walk.ids[tensor] = block


def _slice(walk: Walk, node: Node) -> None:
    axis, ids = int(node.attrs["axis"]), walk.source(node)
    if varies(ids, axis):
        walk.ledger.freeze(ids, f"its channels are cut at written places by {where(node)}")
    cut = [slice(None)] * ids.ndim
    cut[axis] = slice(node.attrs["start"], node.attrs["stop"], node.attrs.get("step", 1))
    taken = ids[tuple(cut)]
    walk.give(node, taken.reshape(walk.shape(node.outputs[0])))


def _reshape(walk: Walk, node: Node) -> None:
    """Cutting a channel axis into blocks ties the positions of the blocks, so that the blocks shrink alike."""
    ids, shape = walk.source(node), walk.shape(node.outputs[0])
    moved = ids.reshape(shape)
    for old, new in axis_map(ids.shape, shape):
        changing = [axis for axis in old if varies(ids, axis)]
        if not changing:
            continue
        if walk.rules.freeze_reshapes:
            walk.ledger.freeze(ids, f"its width is written into {where(node)}")
        elif len(changing) > 1 or (len(old) > 1 and len(new) > 1):
            walk.ledger.freeze(ids, f"channels are mixed with other axes by {where(node)}")
        elif len(old) == 1:
            whole = walk.axes.get(walk.at, new[-1])
            for axis in (a for a in new if a != whole):
                walk.ledger.unite(first_along(moved, axis), moved)
                moved = spread(first_along(moved, axis), shape)  # one id for what is now one
            heads = along(moved, whole) if walk.at in walk.axes else None
            if heads is not None:
                walk.heads.append((node.name, heads))
    walk.give(node, moved)


def _transpose(walk: Walk, node: Node) -> None:
    walk.give(node, walk.source(node).transpose(node.attrs["perm"]))


def _expand(walk: Walk, node: Node) -> None:
    walk.give(node, spread(walk.source(node), walk.shape(node.outputs[0])))


def _pad(walk: Walk, node: Node) -> None:
    """New entries along a channel axis are a constant; along any other they change nothing."""
    ids, shape = walk.source(node), walk.shape(node.outputs[0])
    for axis, (before, after) in enumerate(node.attrs["pads"]):
        size = list(ids.shape)
        if before == after == 0:
            continue
        if before < 0 or after < 0:
            walk.give_up(node, f"a negative padding is used by {where(node)}")
            return
        if not varies(ids, axis):
            size[axis] += before + after
            ids = spread(first_along(ids, axis), size)
            continue
        if node.attrs.get("mode", "constant") != "constant":
            walk.give_up(node, f"channels are mirrored or repeated by {where(node)}")
            return
        edges = [walk.ledger.opaque((*size[:axis], n, *size[axis + 1 :]), "it meets padding") for n in (before, after)]
        ids = np.concatenate([edges[0], ids, edges[1]], axis=axis)
    walk.give(node, spread(ids, shape))


def _spatial(walk: Walk, node: Node) -> None:
    ids = same_shape_axes(walk.source(node), 1, walk.shape(node.outputs[0]))
    if ids is None:
        walk.give_up(node, f"channels cannot be followed through {where(node)}")
        return
    walk.give(node, ids)


def _reduce(walk: Walk, node: Node) -> None:
    ids = walk.source(node)
    axes = tuple(node.attrs["axes"])
    if any(varies(ids, axis) for axis in axes):
        walk.give_up(node, f"channels are reduced by {where(node)}")
        return
    cut = ids[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(ids.ndim))]
    walk.give(node, cut.reshape(walk.shape(node.outputs[0])))


def _softmax(walk: Walk, node: Node) -> None:
    if varies(walk.source(node), int(node.attrs["axis"])):
        _frozen(walk, node)
    else:
        _same(walk, node)


HANDLERS: dict[str, Callable[[Walk, Node], None]] = {
    "input": _input,
    "constant": _constant,
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "elementwise": _same,
    "binary": _binary,
    "concat": _concat,
    "split": _split,
    "slice": _slice,
    "reshape": _reshape,
    "transpose": _transpose,
    "expand": _expand,
    "pad": _pad,
    "pool": _spatial,
    "resize": _spatial,
    "reduce": _reduce,
    "softmax": _softmax,
    "matmul": _matmul,
    "unknown": _unknown,
}
