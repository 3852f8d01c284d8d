"""Channel ids through what moves, joins, cuts and reduces data: one handler for each kind of node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from slimbridge.graph.ids import IdArray, along, first_along, same_shape_axes, spread, varies
from slimbridge.graph.layer_rules import frozen, same
from slimbridge.graph.model import Node
from slimbridge.graph.reshapes import axis_map
from slimbridge.graph.walk import Walk, where


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
    if varies(ids, axis) and walk.at in walk.parts and not walk.rules.freeze_reshapes:
        size = walk.shape(node.outputs[0])[axis]
        blocks = np.split(ids, ids.shape[axis] // size, axis=axis)
        for block in blocks[1:]:
            walk.ledger.unite(blocks[0], block)
        walk.give(node, blocks[0])
        return
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
            walk.ledger.freeze(
                ids, f"its width may be written into {where(node)}: with such channels free the model is wrong"
            )
        elif len(changing) > 1 or (len(old) > 1 and len(new) > 1):
            walk.ledger.freeze(ids, f"channels are mixed with other axes by {where(node)}")
        elif len(old) == 1:
            known = walk.axes.get(walk.at)
            whole = known if known in new else new[-1]
            for axis in (a for a in new if a != whole):
                walk.ledger.unite(first_along(moved, axis), moved)
                moved = spread(first_along(moved, axis), shape)  # one id for what is now one
            heads = along(moved, whole) if walk.at in walk.head_cuts and known in new else None
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
        frozen(walk, node)
    else:
        same(walk, node)


HANDLERS: dict[str, Callable[[Walk, Node], None]] = {
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
}
