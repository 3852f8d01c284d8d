"""Paddle's operations with weights -> layer nodes: convolutions, linear layers and normalisations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimbridge.errors import ModelError
from slimbridge_paddle.names import Entry
from slimbridge_paddle.refs import Active, Literal, Ref, Stored, Unsupported
from slimbridge_paddle.trace_ops import Call, channels_first, handles

if TYPE_CHECKING:
    from slimbridge_paddle.trace import Builder


@handles("conv2d", "depthwise_conv2d", "conv3d")
def _conv(builder: Builder, call: Call) -> list[Ref]:
    attrs = channels_first(call)
    weight = call.operand(1)
    if not isinstance(weight, Stored) or weight.entry is None or not weight.reshaped_only:
        raise Unsupported  # a computed weight
    if weight.shape[:2] != weight.entry.shape[:2]:
        raise Unsupported  # a weight whose channel axes were rearranged
    source = builder.tensor(call.operand(0))
    kernel, channels = weight.shape[2:], builder.shapes[source][1]
    if channels != weight.shape[1] * int(attrs["groups"]):  # Paddle itself notices only when it computes
        raise ModelError(
            f"trace: layer '{builder.path}' takes {weight.shape[1] * int(attrs['groups'])} channels, "
            f"its input has {channels}"
        )
    made = builder.one(
        "conv", (source,), call.shape, {"weight": weight.entry.name},
        groups=int(attrs["groups"]), transposed=False, stride=_tuple(attrs["strides"]),
        padding=_padding(attrs, builder.shapes[source][2:], call.shape[2:], kernel),
        dilation=_tuple(attrs["dilations"]),
    )  # fmt: skip
    _may_fold(builder, call, made)
    return [Active(made)]


def _tuple(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _padding(
    attrs: dict[str, Any], size: tuple[int, ...], result: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[int, ...]:
    """One number for each spatial axis, or (before, after) for each where they differ."""
    given = _tuple(attrs["paddings"])
    if attrs["padding_algorithm"] == "VALID":
        return (0,) * len(size)
    if attrs["padding_algorithm"] == "SAME":
        steps = zip(size, result, kernel, attrs["strides"], attrs["dilations"], strict=True)
        totals = [max(0, (out - 1) * stride + (k - 1) * dilation + 1 - n) for n, out, k, stride, dilation in steps]
        given = tuple(part for total in totals for part in (total // 2, total - total // 2))
    pairs = list(zip(given[::2], given[1::2], strict=False))
    if len(given) == 2 * len(size) and all(before == after for before, after in pairs):
        return tuple(before for before, _ in pairs)
    return given


def _may_fold(builder: Builder, call: Call, made: int) -> None:
    """Let the next operation add a bias, if nothing else reads the result."""
    if builder.uses.get(call.results[0].id, 0) == 1:
        builder.foldable[made] = len(builder.nodes) - 1


@handles("matmul", "bmm")
def _matmul(builder: Builder, call: Call) -> list[Ref]:
    """A linear layer where a stored matrix is on the right, else a product of two tensors."""
    left, right = call.operands
    attrs = call.attrs
    swap_left, swap_right = bool(attrs.get("transpose_x", False)), bool(attrs.get("transpose_y", False))
    weight = _matrix(right)
    # The canonical layout is (out, in) exactly when one of the two transpositions takes place.
    if isinstance(left, Active) and weight is not None and not swap_left and weight.transposed != swap_right:
        made = builder.one("linear", (left.tensor,), call.shape, {"weight": weight.name})
        _may_fold(builder, call, made)
        return [Active(made)]
    inputs = (_swapped(builder, left, swap_left), _swapped(builder, right, swap_right))
    return [Active(builder.one("matmul", inputs, call.shape))]


def _matrix(ref: Ref | None) -> Entry | None:
    """The parameter, if it is one with two axes and nothing was done to it."""
    plain = isinstance(ref, Stored) and not ref.steps and len(ref.origin) == 2
    return ref.entry if plain and isinstance(ref, Stored) else None


def _swapped(builder: Builder, ref: Ref | None, swap: bool) -> int:
    """The tensor, its last two axes exchanged on demand."""
    tensor = builder.tensor(ref)
    shape = builder.shapes[tensor]
    if not swap or len(shape) < 2:
        return tensor
    rank = len(shape)
    perm = (*range(rank - 2), rank - 1, rank - 2)
    return builder.one("transpose", (tensor,), tuple(shape[axis] for axis in perm), perm=perm)


@handles("batch_norm")
def _batch_norm(builder: Builder, call: Call) -> list[Ref]:
    channels_first(call)
    params = _params(call, {1: "running_mean", 2: "running_var", 3: "weight", 4: "bias"})
    return [Active(builder.one("batch_norm", (builder.tensor(call.operand(0)),), call.shape, params))]


@handles("layer_norm")
def _layer_norm(builder: Builder, call: Call) -> list[Ref]:
    axes = tuple(range(int(call.attrs["begin_norm_axis"]), len(call.shape)))
    params = _params(call, {1: "weight", 2: "bias"})
    return [Active(builder.one("layer_norm", (builder.tensor(call.operand(0)),), call.shape, params, axes=axes))]


@handles("group_norm")
def _group_norm(builder: Builder, call: Call) -> list[Ref]:
    groups = int(channels_first(call)["groups"])
    params = _params(call, {1: "weight", 2: "bias"})
    return [Active(builder.one("group_norm", (builder.tensor(call.operand(0)),), call.shape, params, groups=groups))]


def _params(call: Call, roles: dict[int, str]) -> dict[str, str]:
    """Role -> name; a literal in place of a parameter (a layer without scale or shift) is left out."""
    params = {}
    for index, role in roles.items():
        ref = call.operand(index)
        if isinstance(ref, Stored) and ref.entry is not None and ref.reshaped_only:
            params[role] = ref.entry.name
        elif ref is not None and not isinstance(ref, Literal):
            raise Unsupported
    return params
