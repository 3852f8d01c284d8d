"""Paddle's convolutions and normalisations -> layer nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from slimbridge.errors import ModelError
from slimbridge_paddle.names import Entry
from slimbridge_paddle.refs import Active, Literal, Ref, Stored, Unsupported
from slimbridge_paddle.trace_ops import Call, channels_first, handles

if TYPE_CHECKING:
    from slimbridge_paddle.trace import Builder


@handles("conv2d", "depthwise_conv2d", "conv3d")
def _conv(builder: Builder, call: Call) -> list[Ref]:
    attrs = channels_first(call)
    weight, entry = _kernel(call)
    source = builder.tensor(call.operand(0))
    groups = int(attrs["groups"])
    _check_channels(builder, source, weight.shape[1] * groups)
    made = builder.one(
        "conv", (source,), call.shape, {"weight": entry.name},
        groups=groups, transposed=False, stride=_tuple(attrs["strides"]),
        padding=_padding(attrs, builder.shapes[source][2:], call.shape[2:], weight.shape[2:]),
        dilation=_tuple(attrs["dilations"]),
    )  # fmt: skip
    may_fold(builder, call, made)
    return [Active(made)]


@handles("conv2d_transpose", "depthwise_conv2d_transpose", "conv3d_transpose")
def _conv_transpose(builder: Builder, call: Call) -> list[Ref]:
    """Weight (in, out / groups, ...); the output's padding is what its size says beyond the smallest."""
    attrs = channels_first(call)
    weight, entry = _kernel(call)
    source = builder.tensor(call.operand(0))
    _check_channels(builder, source, weight.shape[0])
    small, large, kernel = builder.shapes[source][2:], call.shape[2:], weight.shape[2:]
    stride, dilation = _tuple(attrs["strides"]), _tuple(attrs["dilations"])
    padding = _padding(attrs, large, small, kernel)
    both = padding if len(padding) > len(small) else tuple(side for side in padding for _ in range(2))
    sizes = zip(small, large, kernel, stride, dilation, both[::2], both[1::2], strict=True)
    extra = tuple(out - ((n - 1) * s - a - b + d * (k - 1) + 1) for n, out, k, s, d, a, b in sizes)
    made = builder.one(
        "conv", (source,), call.shape, {"weight": entry.name},
        groups=int(attrs["groups"]), transposed=True, stride=stride, padding=padding, dilation=dilation,
        **({"output_padding": extra} if any(extra) else {}),
    )  # fmt: skip
    may_fold(builder, call, made)
    return [Active(made)]


def _kernel(call: Call) -> tuple[Stored, Entry]:
    """The weight of a convolution; Unsupported where it is computed or its channel axes were rearranged."""
    weight = call.operand(1)
    if not isinstance(weight, Stored) or weight.entry is None or not weight.reshaped_only:
        raise Unsupported
    if weight.shape[:2] != weight.entry.shape[:2]:
        raise Unsupported
    return weight, weight.entry


def _check_channels(builder: Builder, source: int, wanted: int) -> None:
    """Paddle itself notices only when it computes."""
    channels = builder.shapes[source][1]
    if channels != wanted:
        raise ModelError(f"trace: layer '{builder.path}' takes {wanted} channels, its input has {channels}")


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


def may_fold(builder: Builder, call: Call, made: int) -> None:
    """Let the next operation add a bias, if nothing else reads the result."""
    if builder.uses.get(call.results[0].id, 0) == 1:
        builder.foldable[made] = len(builder.nodes) - 1


@handles("batch_norm")
def _batch_norm(builder: Builder, call: Call) -> list[Ref]:
    channels_first(call)
    params = _params(call, {1: "running_mean", 2: "running_var", 3: "weight", 4: "bias"})
    return [Active(builder.one("batch_norm", (builder.tensor(call.operand(0)),), call.shape, params, eps=_eps(call)))]


def _eps(call: Call) -> float:
    """As it was written: the program holds it in float32, which has more digits but not those of the model."""
    return float(str(np.float32(call.attrs["epsilon"])))


@handles("instance_norm")
def _instance_norm(builder: Builder, call: Call) -> list[Ref]:
    params = _params(call, {1: "weight", 2: "bias"})
    return [Active(builder.one("batch_norm", (builder.tensor(call.operand(0)),), call.shape, params, eps=_eps(call)))]


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
