"""Channel ids through layers, constants and arithmetic: one handler for each kind of node."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np

from slimbridge.graph.ids import IdArray, along, first_along, spread, thin, varies
from slimbridge.graph.model import Node
from slimbridge.graph.walk import Producer, Product, Walk, where


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
        held = ": with such channels free the model is wrong" if walk.rules.freeze_attention else ""
        walk.give_up(node, f"two activations are multiplied by {where(node)}{held}")
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


def same(walk: Walk, node: Node) -> None:
    """The output has the ids of the input."""
    walk.give(node, walk.source(node))


def frozen(walk: Walk, node: Node) -> None:
    """The input's channels stay."""
    walk.ledger.freeze(walk.source(node), f"removing channels before {where(node)} is not zeroing them")
    same(walk, node)


def _layer_norm(walk: Walk, node: Node) -> None:
    ids, axes = walk.source(node), tuple(node.attrs["axes"])
    channels = along(ids, axes[0]) if len(axes) == 1 else None
    if not any(varies(ids, axis) for axis in axes):
        same(walk, node)
    elif not walk.rules.layer_norms or channels is None:
        frozen(walk, node)
    else:
        for name in node.params.values():
            walk.ledger.touch(name, 0, channels)
        walk.inexact.append(channels)
        same(walk, node)


def _group_norm(walk: Walk, node: Node) -> None:
    """Whole groups go: the statistics of one group do not depend on another."""
    channels, groups = along(walk.source(node), 1), int(node.attrs["groups"])
    if channels is None or groups == 1 or not node.params:  # without a parameter nothing tells it that groups went
        frozen(walk, node)
        return
    blocks = channels.reshape(groups, -1)
    walk.ledger.unite(blocks[:, :1], blocks)
    for name in node.params.values():
        walk.ledger.touch(name, 0, channels)
    same(walk, node)


def _batch_norm(walk: Walk, node: Node) -> None:
    channels = along(walk.source(node), 1)
    if channels is None:
        walk.give_up(node, f"channels cannot be followed through {where(node)}")
        return
    for name in node.params.values():
        walk.ledger.touch(name, 0, channels)
    same(walk, node)


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
    walk.followers.append(Producer(node.name, "depthwise", node.params["weight"], carried))
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


HANDLERS: dict[str, Callable[[Walk, Node], None]] = {
    "input": _input,
    "constant": _constant,
    "conv": _conv,
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "elementwise": same,
    "binary": _binary,
    "matmul": _matmul,
    "unknown": _unknown,
}
