"""Handlers of the operations that only move data: views, permutations, pieces, joins, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from slimbridge_torch.record import Call, Handler

_RESHAPES = "view reshape _reshape_alias"
_SQUEEZES = "_unsafe_view flatten unflatten squeeze unsqueeze"
_PAD_MODES = {"constant_pad_nd": "constant"} | {
    f"{op}_pad{rank}d": mode
    for op, mode in (("reflection", "reflect"), ("replication", "replicate"))
    for rank in (1, 2, 3)
}


def _reshape(call: Call) -> Sequence[int] | None:
    if call.info.overload == "dtype":  # another reading of the same bits, not of the same numbers
        return None
    if id(call.args[0]) in call.recorder.expanded:  # torch.matmul does this to its operands
        return _squeeze(call)
    # Recorded even where it changes nothing: the model's code may have a width written into it here.
    return [call.emit("reshape", [call.value(call.args[0])])]


def _squeeze(call: Call) -> Sequence[int]:
    return [reshaped(call, call.value(call.args[0]), call.outs[0].shape)]


def reshaped(call: Call, value: int, shape: Sequence[int]) -> int:
    """The value in another shape; itself where that changes nothing."""
    return value if call.shape(value) == tuple(shape) else call.emit("reshape", [value], shape)


def _transpose(call: Call) -> Sequence[int]:
    source = call.value(call.args[0])
    rank = len(call.shape(source))
    perm = list(range(rank))
    if call.info.name == "permute":
        perm = [int(axis) % rank for axis in call.arg("dims")]
    elif rank > 1:
        first, second = (0, 1) if call.info.name == "t" else (call.args[1] % rank, call.args[2] % rank)
        perm[first], perm[second] = perm[second], perm[first]
    return [permuted(call, source, perm)]


def permuted(call: Call, value: int, perm: Sequence[int]) -> int:
    """The value with its axes in the order of `perm`."""
    shape = call.shape(value)
    if list(perm) == sorted(perm):
        return value
    return call.emit("transpose", [value], [shape[axis] for axis in perm], perm=tuple(perm))


def expanded(call: Call, value: int, shape: Sequence[int]) -> int:
    """The value broadcast to a shape."""
    return value if call.shape(value) == tuple(shape) else call.emit("expand", [value], shape)


def _expand(call: Call) -> Sequence[int]:
    call.recorder.expanded.add(id(call.outs[0]))
    return [expanded(call, call.value(call.args[0]), call.outs[0].shape)]


def _copy(call: Call) -> Sequence[int]:
    return [expanded(call, call.value(call.args[1]), call.outs[0].shape)]


def sliced(call: Call, value: int, axis: int, start: int, stop: int, step: int = 1) -> int:
    """Entries start, start + step, ... below stop of an axis."""
    shape = list(call.shape(value))
    if (start, stop, step) == (0, shape[axis], 1):
        return value
    shape[axis] = len(range(start, stop, step))
    return call.emit("slice", [value], shape, axis=axis, start=start, stop=stop, step=step)


def _bounds(call: Call, size: int) -> tuple[int, int, int]:
    """Start, stop and step of a slice argument, in range, without negatives."""
    step = int(call.arg("step", 1))
    start, stop, _ = slice(call.arg("start"), call.arg("end"), step).indices(size)
    return start, max(start, stop), step


def _slice(call: Call) -> Sequence[int]:
    source = call.value(call.args[0])
    shape = call.shape(source)
    axis = int(call.arg("dim", 0)) % len(shape)
    start, stop, step = _bounds(call, shape[axis])
    return [sliced(call, source, axis, start, stop, step)]


def _select(call: Call) -> Sequence[int]:
    source = call.value(call.args[0])
    shape = call.shape(source)
    axis = int(call.args[1]) % len(shape)
    index = int(call.args[2]) % shape[axis]
    return [reshaped(call, sliced(call, source, axis, index, index + 1), call.outs[0].shape)]


def _slice_scatter(call: Call) -> Sequence[int] | None:
    source, piece = call.value(call.args[0]), call.value(call.args[1])
    shape = call.shape(source)
    axis = int(call.arg("dim", 0)) % len(shape)
    start, stop, step = _bounds(call, shape[axis])
    return None if step != 1 else [_overwrite(call, source, piece, axis, (start, stop))]


def _select_scatter(call: Call) -> Sequence[int]:
    source, piece = call.value(call.args[0]), call.value(call.args[1])
    shape = call.shape(source)
    axis = int(call.arg("dim")) % len(shape)
    index = int(call.arg("index")) % shape[axis]
    piece = reshaped(call, piece, [1 if i == axis else size for i, size in enumerate(shape)])
    return [_overwrite(call, source, piece, axis, (index, index + 1))]


def _overwrite(call: Call, source: int, piece: int, axis: int, span: tuple[int, int]) -> int:
    """`source` with the entries of a span of an axis replaced by `piece`."""
    shape = call.shape(source)
    start, stop = span
    parts = [piece]
    if start > 0:
        parts.insert(0, sliced(call, source, axis, 0, start))
    if stop < shape[axis]:
        parts.append(sliced(call, source, axis, stop, shape[axis]))
    return piece if len(parts) == 1 else call.emit("concat", parts, shape, axis=axis)


def _cat(call: Call) -> Sequence[int]:
    rank = len(call.outs[0].shape)
    # An empty vector may be joined to anything; it adds nothing.
    parts = [call.value(part) for part in call.args[0] if tuple(part.shape) != (0,) or rank == 1]
    return [call.emit("concat", parts, axis=int(call.arg("dim", 0)) % rank)]


def _stack(call: Call) -> Sequence[int]:
    shape = list(call.outs[0].shape)
    axis = int(call.arg("dim", 0)) % len(shape)
    shape[axis] = 1
    return [call.emit("concat", [reshaped(call, call.value(x), shape) for x in call.args[0]], axis=axis)]


def _split(call: Call) -> Sequence[int]:
    source = call.value(call.args[0])
    axis = int(call.arg("dim", 0)) % len(call.shape(source))
    sizes = tuple(int(out.shape[axis]) for out in call.outs)
    return call.emit_many("split", [source], [out.shape for out in call.outs], axis=axis, sizes=sizes)


def _unbind(call: Call) -> Sequence[int]:
    source = call.value(call.args[0])
    shape = list(call.shape(source))
    axis = int(call.arg("dim", 0)) % len(shape)
    count, shape[axis] = shape[axis], 1
    pieces = call.emit_many("split", [source], [shape] * count, axis=axis, sizes=(1,) * count)
    return [reshaped(call, piece, call.outs[0].shape) for piece in pieces]


def _repeat(call: Call) -> Sequence[int]:
    value = call.value(call.args[0])
    repeats = [int(times) for times in call.arg("repeats")]
    shape = list(call.shape(value))
    shape = [1] * (len(repeats) - len(shape)) + shape
    value = reshaped(call, value, shape)
    for axis, times in enumerate(repeats):
        size = shape[axis]
        shape[axis] = size * times
        if size == 1:
            value = expanded(call, value, shape)
        elif times != 1:
            value = call.emit("concat", [value] * times, shape, axis=axis)
    return [value]


def _pad(call: Call) -> Sequence[int] | None:
    source = call.value(call.args[0])
    numbers = [int(number) for number in call.arg(1)]
    if min(numbers) < 0:
        return None
    pairs = [(numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]
    pads = ((0, 0),) * (len(call.shape(source)) - len(pairs)) + tuple(reversed(pairs))
    return [call.emit("pad", [source], pads=pads, mode=_PAD_MODES[call.info.name])]


def _roll(call: Call) -> Sequence[int] | None:
    value = call.value(call.args[0])
    shape = call.shape(value)
    if not call.arg("dims"):
        return None
    for shift, dim in zip(call.arg("shifts"), call.arg("dims"), strict=True):
        axis = int(dim) % len(shape)
        cut = -int(shift) % shape[axis]
        if cut:
            ends = [sliced(call, value, axis, cut, shape[axis]), sliced(call, value, axis, 0, cut)]
            value = call.emit("concat", ends, shape, axis=axis)
    return [value]


def _flip(call: Call) -> Sequence[int] | None:
    """Turned round along spatial axes: what a resize does to channels on axis 1, and to any other, says it all."""
    rank = len(call.outs[0].shape)
    if rank < 2 or any(int(axis) % rank == 1 for axis in call.arg("dims")):
        return None
    return [call.emit("resize", [call.value(call.args[0])], op="flip")]


def _channel_shuffle(call: Call) -> Sequence[int]:
    value = call.value(call.args[0])
    shape = call.shape(value)
    groups = int(call.arg("groups"))
    blocks = (shape[0], groups, shape[1] // groups, prod(shape[2:]))
    value = permuted(call, reshaped(call, value, blocks), (0, 2, 1, 3))
    return [reshaped(call, value, shape)]


def _pixel_shuffle(call: Call) -> Sequence[int]:
    value = call.value(call.args[0])
    *batch, channels, height, width = call.shape(value)
    factor = int(call.arg(1))
    lead = len(batch)
    value = reshaped(call, value, (*batch, channels // factor**2, factor, factor, height, width))
    value = permuted(call, value, (*range(lead + 1), lead + 3, lead + 1, lead + 4, lead + 2))
    return [reshaped(call, value, call.outs[0].shape)]


def _pixel_unshuffle(call: Call) -> Sequence[int]:
    value = call.value(call.args[0])
    *batch, channels, height, width = call.shape(value)
    factor = int(call.arg(1))
    lead = len(batch)
    value = reshaped(call, value, (*batch, channels, height // factor, factor, width // factor, factor))
    value = permuted(call, value, (*range(lead + 1), lead + 2, lead + 4, lead + 1, lead + 3))
    return [reshaped(call, value, call.outs[0].shape)]


MOVES: Mapping[str, Handler] = {
    **dict.fromkeys(_RESHAPES.split(), _reshape),
    **dict.fromkeys(_SQUEEZES.split(), _squeeze),
    **dict.fromkeys(("t", "transpose", "permute"), _transpose),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk"), _split),
    **dict.fromkeys(_PAD_MODES, _pad),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), _channel_shuffle),
    "expand": _expand,
    "copy": _copy,
    "slice": _slice,
    "select": _select,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "cat": _cat,
    "stack": _stack,
    "unbind": _unbind,
    "repeat": _repeat,
    "roll": _roll,
    "flip": _flip,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
