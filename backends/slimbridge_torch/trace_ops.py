"""How each aten operation becomes nodes: the table `HANDLERS`, by the operation's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from slimbridge_torch.record import Call, Handler
from slimbridge_torch.trace_moves import MOVES, reshaped

Tensor = Any

_UNARY = """abs acos acosh asin asinh atan atanh bitwise_not ceil celu clamp clamp_max clamp_min clip cos cosh elu erf
erfc exp exp2 expm1 floor frac gelu hardshrink hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu log
log10 log1p log2 logical_not logit mish nan_to_num neg reciprocal relu relu6 round rsqrt selu sgn sigmoid sign silu
sin sinh softplus softshrink sqrt square tan tanh threshold trunc"""
_BINARY = """add atan2 bitwise_and bitwise_or div eq floor_divide fmax fmin fmod ge gt le logical_and logical_or
logical_xor lt masked_fill maximum minimum mul ne pow remainder rsub sub _prelu_kernel true_divide"""
_SAME = "alias clone contiguous detach lift lift_fresh lift_fresh_copy _to_copy"
_LITERAL = "bernoulli fill new_empty new_empty_strided new_full new_ones new_zeros normal random uniform zero"
_LIKE = "empty_like full_like ones_like rand_like randn_like zeros_like"
_POOLS = {
    "max_pool2d_with_indices": "max",
    "max_pool3d_with_indices": "max",
    "adaptive_max_pool2d": "max",
    "adaptive_max_pool3d": "max",
    "avg_pool2d": "avg",
    "avg_pool3d": "avg",
    "_adaptive_avg_pool2d": "avg",
    "_adaptive_avg_pool3d": "avg",
}
_NORMS = "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm"
_REDUCE = {"mean": "mean", "sum": "sum", "amax": "max", "amin": "min", "max": "max", "min": "min"} | {
    "std": "std", "var": "var", "std_mean": "std+mean", "var_mean": "var+mean", "linalg_vector_norm": "norm",
}  # fmt: skip
_RESIZE = [f"{start}upsample_{mode}" for start in ("", "_") for mode in (
    "nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d",
    "nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa", "bicubic2d_aa",
)]  # fmt: skip


def _roles(call: Call, tensors: Mapping[str, Tensor | None]) -> dict[str, str] | None:
    """Role -> parameter name of the tensors that are there; None if one of them is computed."""
    names = {role: call.recorder.parameter(tensor) for role, tensor in tensors.items() if tensor is not None}
    found = {role: name for role, name in names.items() if name is not None}
    return found if len(found) == len(names) else None


def _convolution(call: Call) -> Sequence[int] | None:
    params = _roles(call, {"weight": call.arg("weight"), "bias": call.arg("bias")})
    if params is None:
        return None
    attrs: dict[str, Any] = {"groups": int(call.arg("groups")), "transposed": bool(call.arg("transposed", False))}
    for name in ("stride", "padding", "dilation"):
        attrs[name] = tuple(int(size) for size in call.arg(name))
    extra = tuple(int(size) for size in call.arg("output_padding", ()))
    if any(extra):
        attrs["output_padding"] = extra
    return [call.emit("conv", [call.value(call.arg("input"))], params=params, **attrs)]


def _inputs(call: Call) -> list[int]:
    return [call.value(arg) for arg in call.args if isinstance(arg, torch.Tensor)]


def _weight(call: Call, tensor: Tensor) -> str | None:
    """The parameter whose transpose each matrix of a stack is, as `x @ weight.t()` uses it."""
    node = call.recorder.maker(call.value(tensor))
    matrix = tuple(tensor.shape[-2:])
    while node is not None and node.kind in ("expand", "reshape") and call.shape(node.inputs[0])[-2:] == matrix:
        node = call.recorder.maker(node.inputs[0])
    if node is None or node.kind != "transpose" or node.attrs["perm"] != (1, 0):
        return None
    constant = call.recorder.maker(node.inputs[0])
    return constant.params.get("value") if constant is not None and constant.kind == "constant" else None


def _mm(call: Call) -> Sequence[int]:
    left, right = call.args[:2]
    weight = _weight(call, right)
    if weight is None:
        return [call.emit("matmul", [call.value(left), call.value(right)])]
    return [call.emit("linear", [call.value(left)], params={"weight": weight})]


def _addmm(call: Call) -> Sequence[int]:
    bias, left, right = call.args[:3]
    plain = call.arg("alpha", 1) == 1 and call.arg("beta", 1) == 1
    weight = _weight(call, right) if left.ndim == 2 else None
    name = call.recorder.parameter(bias)
    if weight is not None and name is not None and plain and bias.ndim == 1:
        return [call.emit("linear", [call.value(left)], params={"weight": weight, "bias": name})]
    if weight is not None:
        product = call.emit("linear", [call.value(left)], params={"weight": weight})
    else:
        product = call.emit("matmul", [call.value(left), call.value(right)])
    if not plain:
        product = call.emit("elementwise", [product], op="mul")
    return [call.emit("binary", [call.value(bias), product], op="add")]


def _linear(call: Call) -> Sequence[int] | None:
    params = _roles(call, {"weight": call.arg(1), "bias": call.arg(2)})
    return None if params is None else [call.emit("linear", [call.value(call.args[0])], params=params)]


def _batch_norm(call: Call) -> Sequence[int] | None:
    roles = ("weight", "bias", "running_mean", "running_var")
    tensors = {role: call.arg(role) for role in roles if call.arg(role) is not None}
    computed = [role for role, tensor in tensors.items() if call.recorder.parameter(tensor) is None]
    if not all(_arranged(call, call.value(tensors[role])) for role in computed):
        return None
    params = _roles(call, {role: tensor for role, tensor in tensors.items() if role not in computed})
    eps = float(call.arg("eps", call.arg("epsilon")))
    made = call.emit("batch_norm", [call.value(call.args[0])], params=params, eps=eps)
    # InstanceNorm repeats its vectors for every image of the batch: its channels meet them one by one.
    single = (1,) * (call.args[0].ndim - 2)
    for role in sorted(computed, key=tuple(_NORM_STEPS).index):
        vector = reshaped(call, call.value(tensors[role]), (1, tensors[role].numel(), *single))
        made = call.emit("binary", [made, vector], op=_NORM_STEPS[role])
    return [made]


_NORM_STEPS = {"running_mean": "sub", "running_var": "div", "weight": "mul", "bias": "add"}


def _arranged(call: Call, value: int) -> bool:
    """Is it made of parameters and buffers alone, repeated, joined or reshaped?"""
    node = call.recorder.maker(value)
    if node is None or node.kind not in ("constant", "concat", "expand", "reshape"):
        return False
    return "value" in node.params if node.kind == "constant" else all(_arranged(call, item) for item in node.inputs)


def _layer_norm(call: Call) -> Sequence[int] | None:
    params = _roles(call, {role: call.arg(role) for role in ("weight", "bias")})
    if params is None:
        return None
    rank = call.args[0].ndim
    axes = tuple(range(rank - len(call.arg("normalized_shape")), rank))
    return [call.emit("layer_norm", [call.value(call.args[0])], params=params, axes=axes)]


def _group_norm(call: Call) -> Sequence[int] | None:
    params = _roles(call, {role: call.arg(role) for role in ("weight", "bias")})
    if params is None:
        return None
    return [call.emit("group_norm", [call.value(call.args[0])], params=params, groups=int(call.arg("group")))]


def _unary(call: Call) -> Sequence[int]:
    op = call.info.name
    if op == "hardtanh" and (call.arg("min_val", -1), call.arg("max_val", 1)) == (0, 6):
        op = "relu6"
    values = _inputs(call)
    if len(values) == 1:
        return [call.emit("elementwise", values, op=op)]
    for value in values[1:]:  # clamp with tensors as limits
        values[0] = call.emit("binary", [values[0], value], op=op)
    return values[:1]


def _binary(call: Call) -> Sequence[int]:
    op = {"_prelu_kernel": "prelu"}.get(call.info.name, call.info.name)
    values = _inputs(call)
    if len(values) == 1:
        return [call.emit("elementwise", values, op=op)]
    if op in ("add", "sub", "rsub") and call.arg("alpha", 1) != 1:
        values[1] = call.emit("elementwise", values[1:2], call.shape(values[1]), op="mul")
    result = call.emit("binary", values[:2], op=op)
    for extra in values[2:]:  # masked_fill with a tensor as value
        result = call.emit("binary", [result, extra], op=op)
    return [result]


def _where(call: Call) -> Sequence[int]:
    condition, *rest = _inputs(call)
    for value in rest:
        condition = call.emit("binary", [condition, value], _broadcast(call, condition, value), op="where")
    return [condition]


def _broadcast(call: Call, *values: int) -> tuple[int, ...]:
    shapes = (call.shape(value) for value in values)
    return tuple(torch.broadcast_shapes(*shapes))


def _same(call: Call) -> Sequence[int]:
    return [call.value(call.args[0])]


def _literal(call: Call) -> Sequence[int]:
    return []


def _like(call: Call) -> Sequence[int]:
    call.recorder.add_like(call.outs[0], call.args[0])
    return []


def _pool(call: Call) -> Sequence[int]:
    return [call.emit("pool", [call.value(call.args[0])], op=_POOLS[call.info.name])]


def _resize(call: Call) -> Sequence[int]:
    return [call.emit("resize", [call.value(call.args[0])])]


def _reduce(call: Call) -> Sequence[int] | None:
    if call.info.overload == "other":
        return _binary(call)
    if call.info.overload in ("names_dim", "names_std_dim", "correction_names", "unary_out"):
        return None
    rank = call.args[0].ndim
    dims = call.arg("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    axes = tuple(sorted(dim % rank for dim in dims)) if rank else ()
    keep = bool(call.arg("keepdim", False))
    source = call.value(call.args[0])
    return [call.emit("reduce", [source], op=op, axes=axes, keepdims=keep) for op in _REDUCE[call.info.name].split("+")]


def _softmax(call: Call) -> Sequence[int]:
    rank = max(call.args[0].ndim, 1)
    return [call.emit("softmax", [call.value(call.args[0])], axis=int(call.arg("dim")) % rank)]


def _baddbmm(call: Call) -> Sequence[int]:
    bias, left, right = _inputs(call)
    return [call.emit("binary", [bias, call.emit("matmul", [left, right])], op="add")]


def _glu(call: Call) -> Sequence[int]:
    source = call.value(call.args[0])
    shape = call.outs[0].shape
    axis = int(call.arg("dim", -1)) % len(shape)
    left, right = call.emit_many("split", [source], [shape, shape], axis=axis, sizes=(shape[axis],) * 2)
    return [call.emit("binary", [left, call.emit("elementwise", [right], op="sigmoid")], op="mul")]


HANDLERS: Mapping[str, Handler] = {
    **{name: _unary for name in _UNARY.split()},
    **{name: _binary for name in _BINARY.split()},
    **{name: _same for name in _SAME.split()},
    **dict.fromkeys(_LITERAL.split(), _literal),
    **dict.fromkeys(_LIKE.split(), _like),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_RESIZE, _resize),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_NORMS.split(), _batch_norm),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax"), _softmax),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "linear": _linear,
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _mm,
    "baddbmm": _baddbmm,
    "where": _where,
    "glu": _glu,
    **MOVES,
}
