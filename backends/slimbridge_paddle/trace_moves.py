"""Paddle's operations that move data -> nodes: splitting, joining, reshaping, slicing, padding."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from slimbridge_paddle.refs import Active, Bundle, Literal, Ref, Stored, Unsupported
from slimbridge_paddle.trace_ops import Call, Shape, channels_first, handles

if TYPE_CHECKING:
    from slimbridge_paddle.trace import Builder


def _shapes(value: Any) -> list[Shape]:
    """Shapes of a result that is a vector of tensors."""
    return [tuple(int(size) for size in item.shape) for item in value.type().as_vec_type().as_list()]


@handles("split", "split_with_num")
def _split(builder: Builder, call: Call) -> list[Ref]:
    shapes = _shapes(call.results[0])
    source = builder.tensor(call.operand(0))
    axis = call.integers(len(call.operands) - 1)[0] % len(builder.shapes[source])
    made = builder.emit("split", (source,), shapes, axis=axis, sizes=tuple(shape[axis] for shape in shapes))
    return [Bundle(tuple(Active(item) for item in made))]


@handles("unbind", "unstack")
def _unbind(builder: Builder, call: Call) -> list[Ref]:
    """Pieces of size one, their axis dropped."""
    shapes = _shapes(call.results[0])
    source = builder.tensor(call.operand(0))
    shape = builder.shapes[source]
    axis = int(call.attrs["axis"]) % len(shape)
    piece = (*shape[:axis], 1, *shape[axis + 1 :])
    made = builder.emit("split", (source,), [piece] * len(shapes), axis=axis, sizes=(1,) * len(shapes))
    flat = [builder.one("reshape", (item,), wanted) for item, wanted in zip(made, shapes, strict=True)]
    return [Bundle(tuple(Active(item) for item in flat))]


@handles("builtin_split", "slice_of_bundle")
def _unpack(builder: Builder, call: Call) -> list[Ref]:
    items = _bundle(call).items
    return list(items) if call.name == "builtin_split" else [items[int(call.attrs["index"])]]


def _bundle(call: Call) -> Bundle:
    """The first operand, which has to be a bundle."""
    bundle = call.operand(0)
    if not isinstance(bundle, Bundle):
        raise Unsupported
    return bundle


@handles("concat")
def _concat(builder: Builder, call: Call) -> list[Ref]:
    axis = call.integers(1)[0] % len(call.shape)
    items = [builder.tensor(ref) for ref in _bundle(call).items]
    return [Active(builder.one("concat", items, call.shape, axis=axis))]


@handles("stack")
def _stack(builder: Builder, call: Call) -> list[Ref]:
    """A new axis for each, then a concat."""
    axis = int(call.attrs["axis"]) % len(call.shape)
    single = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
    items = [builder.one("reshape", (builder.tensor(ref),), single) for ref in _bundle(call).items]
    return [Active(builder.one("concat", items, call.shape, axis=axis))]


@handles("reshape", "flatten", "squeeze", "unsqueeze", "view_shape")
def _reshape(builder: Builder, call: Call) -> list[Ref]:
    first = call.operand(0)
    if isinstance(first, Stored):
        return [first.then("reshape", call.shape)]
    return [Active(builder.one("reshape", (builder.tensor(first),), call.shape))]


@handles("transpose")
def _transpose(builder: Builder, call: Call) -> list[Ref]:
    perm = tuple(int(axis) % len(call.shape) for axis in call.attrs["perm"])
    first = call.operand(0)
    if isinstance(first, Stored):
        return [first.then("transpose", call.shape, perm=perm)]
    return [Active(builder.one("transpose", (builder.tensor(first),), call.shape, perm=perm))]


@handles("slice", "strided_slice")
def _slice(builder: Builder, call: Call) -> list[Ref]:
    """One node for each axis, then a reshape where axes are dropped."""
    made = builder.tensor(call.operand(0))
    attrs, shape = call.attrs, list(builder.shapes[made])
    starts, stops = call.integers(1), call.integers(2)
    steps = call.integers(3) if call.name == "strided_slice" else (1,) * len(starts)
    for given, start, stop, step in zip(attrs["axes"], starts, stops, steps, strict=True):
        if step < 1:
            raise Unsupported
        axis = int(given) % len(shape)
        first, last, _ = slice(start, stop, step).indices(shape[axis])
        if (first, last, step) == (0, shape[axis], 1):
            continue
        shape[axis] = len(range(first, last, step))
        made = builder.one("slice", (made,), tuple(shape), axis=axis, start=first, stop=last, step=step)
    if prod(shape) != prod(call.shape):
        raise Unsupported
    if tuple(shape) != call.shape:
        made = builder.one("reshape", (made,), call.shape)
    return [Active(made)]


@handles("tile")
def _tile(builder: Builder, call: Call) -> list[Ref]:
    """Joined with itself along each axis that is repeated; an axis of one entry is a broadcast."""
    made = builder.tensor(call.operand(0))
    rank, shape = len(call.shape), builder.shapes[made]
    if len(shape) < rank:
        shape = (1,) * (rank - len(shape)) + shape
        made = builder.one("reshape", (made,), shape)
    for axis, (old, new) in enumerate(zip(shape, call.shape, strict=True)):
        if old == new:
            continue
        if old == 0 or new == 0:
            raise Unsupported
        shape = (*shape[:axis], new, *shape[axis + 1 :])
        if old == 1:
            made = builder.one("expand", (made,), shape)
        else:
            made = builder.one("concat", (made,) * (new // old), shape, axis=axis)
    return [Active(made)]


@handles("roll")
def _roll(builder: Builder, call: Call) -> list[Ref]:
    """Both ends of each axis that is rolled, exchanged."""
    made = builder.tensor(call.operand(0))
    shape, axes = call.shape, call.attrs["axis"]
    if not axes:
        raise Unsupported  # rolled as if it had one axis
    for given, shift in zip(axes, call.integers(1), strict=True):
        axis = int(given) % len(shape)
        cut = -shift % shape[axis]
        ends = [_piece(builder, made, axis, *ends) for ends in ((cut, shape[axis]), (0, cut)) if ends[0] < ends[1]]
        made = builder.one("concat", ends, shape, axis=axis) if len(ends) > 1 else made
    return [Active(made)]


def _piece(builder: Builder, tensor: int, axis: int, start: int, stop: int) -> int:
    shape = list(builder.shapes[tensor])
    if (start, stop) == (0, shape[axis]):
        return tensor
    shape[axis] = stop - start
    return builder.one("slice", (tensor,), tuple(shape), axis=axis, start=start, stop=stop, step=1)


@handles("masked_fill")
def _masked_fill(builder: Builder, call: Call) -> list[Ref]:
    """The tensor meets the mask, then the filling where that is a tensor."""
    made = builder.tensor(call.operand(0))
    for ref in call.operands[1:]:
        if not isinstance(ref, Literal) or prod(ref.shape) > 1:
            made = builder.one("binary", (made, builder.tensor(ref)), call.shape, op="where")
    return [Active(made)]


@handles("where")
def _where(builder: Builder, call: Call) -> list[Ref]:
    """The condition meets one choice, then the other."""
    made = builder.tensor(call.operand(0))
    for ref in call.operands[1:]:
        if isinstance(ref, Literal) and prod(ref.shape) == 1:
            made = builder.one("elementwise", (made,), builder.shapes[made], op="where")
            continue
        other = builder.tensor(ref)
        shape = np.broadcast_shapes(builder.shapes[made], builder.shapes[other])
        made = builder.one("binary", (made, other), shape, op="where")
    if builder.shapes[made] != call.shape:
        raise Unsupported
    return [Active(made)]


@handles("expand", "expand_as")
def _expand(builder: Builder, call: Call) -> list[Ref]:
    source = builder.tensor(call.operand(0))
    shape = builder.shapes[source]
    padded = (1,) * (len(call.shape) - len(shape)) + shape
    if any(old not in (1, new) for old, new in zip(padded, call.shape, strict=True)):
        raise Unsupported  # a repetition, not a broadcast
    return [Active(builder.one("expand", (source,), call.shape))]


@handles("pad", "pad3d")
def _pad(builder: Builder, call: Call) -> list[Ref]:
    attrs = channels_first(call)
    source = builder.tensor(call.operand(0))
    rank = len(call.shape)
    mode = str(attrs.get("mode", "constant"))
    if mode not in ("constant", "reflect", "replicate", "circular"):
        raise Unsupported
    pads: tuple[tuple[int, int], ...]
    if call.name == "pad":
        call.only_literals(1)
        flat = [int(item) for item in attrs["paddings"]]
        pads = tuple((flat[2 * axis], flat[2 * axis + 1]) for axis in range(rank))
    else:  # (left, right, top, bottom, front, back): the last axis comes first
        flat = list(call.integers(1))
        spatial = [(flat[2 * index], flat[2 * index + 1]) for index in range(len(flat) // 2)][::-1]
        pads = (*((0, 0),) * (rank - len(spatial)), *spatial)
    return [Active(builder.one("pad", (source,), call.shape, pads=pads, mode=mode))]
