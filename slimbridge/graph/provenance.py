"""Channel ids through the graph: one handler for each kind of node.

Each output channel of a convolution or linear layer gets an id. The graph then runs once on arrays of ids in
place of activations: data movement moves ids, an elementwise operation on two activations unites the ids it
meets, a normalisation carries them and records which of its parameters they touch, a layer consumes ids on its
input axis and issues new ones. What cannot be followed soundly is frozen, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np

from slimbridge.graph.ids import IdArray, Ledger, along, first_along, same_shape_axes, spread, thin, varies
from slimbridge.graph.model import Graph, Node
from slimbridge.graph.reshapes import axis_map


@dataclass(frozen=True)
class Producer:
    """A convolution or linear layer that issued ids: its path, weight's name, and the ids of its outputs."""

    layer: str
    weight: str
    ids: IdArray


@dataclass
class Walk:
    """State of one walk: tensor id -> channel ids, the ledger, the producers met, constants' tensor ids."""

    graph: Graph
    freeze_reshapes: bool
    ids: dict[int, IdArray] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    producers: list[Producer] = field(default_factory=list)
    constants: set[int] = field(default_factory=set)

    def run(self) -> Walk:
        """Walk the nodes in order and freeze the model's outputs."""
        for node in self.graph.nodes:
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
    tensor = node.outputs[0]
    walk.constants.add(tensor)
    walk.give(node, walk.ledger.opaque(walk.shape(tensor), "it meets a constant of its own size"))


def _unknown(walk: Walk, node: Node) -> None:
    walk.give_up(node, f"the tracer does not know {where(node)}")


def _matmul(walk: Walk, node: Node) -> None:
    walk.give_up(node, f"two activations are multiplied by {where(node)}")


def _same(walk: Walk, node: Node) -> None:
    walk.give(node, walk.source(node))


def _norm_frozen(walk: Walk, node: Node) -> None:
    reason = f"removing channels before {where(node)} is not zeroing them"
    walk.ledger.freeze(walk.source(node), reason)
    _same(walk, node)


def _batch_norm(walk: Walk, node: Node) -> None:
    channels = along(walk.source(node), 1)
    if channels is None:
        walk.give_up(node, f"channels cannot be followed through {where(node)}")
        return
    for name in node.params.values():
        walk.ledger.touch(name, 0, channels)
    _same(walk, node)


def _issue(walk: Walk, node: Node, axis: int) -> IdArray:
    """New ids for the node's output channels, spread over its output tensor."""
    weight = node.params["weight"]
    ids = walk.ledger.issue(walk.graph.parameters[weight][0])
    walk.producers.append(Producer(node.name, weight, ids))
    _touch_outputs(walk, node, ids)
    view = [1] * len(walk.shape(node.outputs[0]))
    view[axis] = ids.size
    walk.give(node, spread(ids.reshape(view), walk.shape(node.outputs[0])))
    return ids


def _touch_outputs(walk: Walk, node: Node, ids: IdArray) -> None:
    for role in ("weight", "bias"):
        if role in node.params:
            walk.ledger.touch(node.params[role], 0, ids)


def _conv(walk: Walk, node: Node) -> None:
    groups = int(node.attrs.get("groups", 1))
    channels = along(walk.source(node), 1)
    if channels is None:
        walk.ledger.freeze(walk.source(node), f"channels cannot be followed into {where(node)}")
        channels = np.array(walk.ledger.opaque((walk.shape(node.inputs[0])[1],), "its inputs are frozen"))
    weight = node.params["weight"]
    outputs, per_group = walk.graph.parameters[weight][:2]
    if groups > 1 and per_group == 1:
        carried = np.repeat(channels, outputs // groups)
        _touch_outputs(walk, node, carried)
        view = [1, carried.size] + [1] * (len(walk.shape(node.outputs[0])) - 2)
        walk.give(node, spread(carried.reshape(view), walk.shape(node.outputs[0])))
        return
    blocks = channels.reshape(groups, per_group)
    walk.ledger.unite(blocks[:1], blocks)
    walk.ledger.touch(weight, 1, blocks[0])
    issued = _issue(walk, node, axis=1).reshape(groups, outputs // groups)
    walk.ledger.unite(issued[:1], issued)


def _linear(walk: Walk, node: Node) -> None:
    ids = walk.source(node)
    channels = along(ids, ids.ndim - 1)
    if channels is None:
        reason = f"the linear layer '{node.name}' works along another axis than the channels"
        walk.ledger.freeze(ids, reason)
        channels = np.array(walk.ledger.opaque((ids.shape[-1],), reason))
    walk.ledger.touch(node.params["weight"], 1, channels)
    _issue(walk, node, axis=len(walk.shape(node.outputs[0])) - 1)


def _binary(walk: Walk, node: Node) -> None:
    """Unite what meets; a map of one channel times a tensor of many stays apart, and must stay."""
    shape = walk.shape(node.outputs[0])
    left, right = (_aligned(walk.ids[tensor], len(shape)) for tensor in node.inputs)
    scalars = [tensor in walk.constants and prod(walk.shape(tensor)) == 1 for tensor in node.inputs]
    if any(scalars):
        walk.give(node, spread(right if scalars[0] else left, shape))
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
        if len(set(sizes)) > 1 or walk.freeze_reshapes:
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
        if walk.freeze_reshapes:
            walk.ledger.freeze(ids, f"its width is written into {where(node)}")
        elif len(changing) > 1 or (len(old) > 1 and len(new) > 1):
            walk.ledger.freeze(ids, f"channels are mixed with other axes by {where(node)}")
        elif len(old) == 1:
            for axis in new[:-1]:
                walk.ledger.unite(first_along(moved, axis), moved)
                moved = spread(first_along(moved, axis), shape)  # one id for what is now one
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
        _norm_frozen(walk, node)
    else:
        _same(walk, node)


HANDLERS: dict[str, Callable[[Walk, Node], None]] = {
    "input": _input,
    "constant": _constant,
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _norm_frozen,
    "group_norm": _norm_frozen,
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
