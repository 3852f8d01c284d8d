"""Paddle's operations (PIR names) -> nodes of the neutral graph, except the layers with weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

from slimbridge_paddle.refs import Active, Bundle, Literal, Ref, Stored, Unsupported

if TYPE_CHECKING:
    from slimbridge_paddle.trace import Builder

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """One operation: its name without dialect and in-place mark, what it reads (None: left out) and makes."""

    name: str
    operation: Any
    operands: Sequence[Ref | None]
    results: Sequence[Any]

    @property
    def attrs(self) -> dict[str, Any]:
        """Its attributes."""
        return dict(self.operation.attrs())

    @property
    def shape(self) -> Shape:
        """Shape of the first result."""
        return tuple(int(size) for size in self.results[0].shape)

    def operand(self, index: int) -> Ref | None:
        """An operand, None where there is none."""
        return self.operands[index] if index < len(self.operands) else None

    def literal(self, index: int) -> Any:
        """The value of a literal operand."""
        ref = self.operand(index)
        if isinstance(ref, Literal) and ref.value is not None:
            return ref.value
        raise Unsupported

    def integers(self, index: int) -> tuple[int, ...]:
        """A literal operand as integers."""
        value = self.literal(index)
        return tuple(int(item) for item in (value if isinstance(value, (list, tuple)) else [value]))

    def only_literals(self, start: int) -> None:
        """Raise Unsupported unless all operands from `start` on are literals or left out."""
        if not all(_is_literal(ref) for ref in self.operands[start:]):
            raise Unsupported


Handler: TypeAlias = Callable[["Builder", Call], list[Ref]]
HANDLERS: dict[str, Handler] = {}

_ELEMENTWISE = """
    relu relu6 hardswish hardsigmoid hardtanh hardshrink softshrink tanh_shrink thresholded_relu sigmoid logsigmoid
    silu swish gelu tanh leaky_relu elu selu celu softplus softsign mish stanh exp expm1 log log2 log10 log1p sqrt
    rsqrt square abs sign floor ceil round trunc sin cos tan asin acos atan sinh cosh reciprocal erf pow scale clip
    cast assign dropout logical_not isnan isinf isfinite share_data memcpy_h2d memcpy_d2h
"""
ELEMENTWISE = frozenset(_ELEMENTWISE.split())
BINARY = {
    "add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "maximum": "max", "minimum": "min",
    "fmax": "max", "fmin": "min", "elementwise_pow": "pow", "remainder": "mod", "floor_divide": "floor_div",
    "greater_than": "gt", "greater_equal": "ge", "less_than": "lt", "less_equal": "le", "equal": "eq",
    "not_equal": "ne", "logical_and": "and", "logical_or": "or",
}  # fmt: skip
SHAPE_ONLY = frozenset(("shape", "shape64", "numel", "full_like", "full_batch_size_like", "zeros_like", "ones_like"))
_LIKE = ("full_like", "zeros_like", "ones_like")
RESIZES = ("bilinear_interp", "nearest_interp", "bicubic_interp", "linear_interp", "trilinear_interp")
_VALUED = ("full", "full_int_array", "assign_value")
CHANNELS_LAST = ("NHWC", "NDHWC", "NLC")


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for operations."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def translate(builder: Builder, call: Call) -> list[Ref]:
    """The references of an operation's results; nodes are added to the builder.

    Raises:
        Unsupported: the operation, or this use of it, is not in the vocabulary.
    """
    if call.operation.num_regions() or any(_depends_on_data(value) for value in call.results):
        raise Unsupported
    if call.name == "combine":
        return [Bundle(tuple(ref if ref is not None else Literal(()) for ref in call.operands))]
    first = call.operand(0)
    if call.name in _LIKE and isinstance(first, Active) and builder.shapes[first.tensor] == call.shape:
        return [Literal(call.shape, like=first.tensor)]
    if call.name in SHAPE_ONLY or all(_is_literal(ref) for ref in call.operands):
        return [_literal(call, value) for value in call.results]
    if call.name in ELEMENTWISE:
        return _elementwise(builder, call)
    if call.name in BINARY:
        return _binary(builder, call)
    handler = HANDLERS.get(call.name)
    if handler is None:
        raise Unsupported
    return handler(builder, call)


def _is_literal(ref: Ref | None) -> bool:
    if isinstance(ref, Bundle):
        return all(_is_literal(item) for item in ref.items)
    return ref is None or isinstance(ref, Literal)


def _depends_on_data(value: Any) -> bool:
    # The last result of a batch normalisation is a scratch value of unknown size, hence the test for one axis.
    return value.type().as_vec_type() is None and len(value.shape) > 1 and any(int(size) < 0 for size in value.shape)


def _literal(call: Call, value: Any) -> Ref:
    vector = value.type().as_vec_type()
    if vector:
        return Bundle(tuple(Literal(tuple(int(size) for size in item.shape)) for item in vector.as_list()))
    known = call.attrs.get("value", call.attrs.get("values")) if call.name in _VALUED else None
    return Literal(tuple(int(size) for size in value.shape), known)


def channels_first(call: Call) -> dict[str, Any]:
    """The attributes; Unsupported when the channels come last."""
    attrs = call.attrs
    if attrs.get("data_format", "NCHW") in CHANNELS_LAST:
        raise Unsupported
    return attrs


def axes_of(value: Any, rank: int) -> tuple[int, ...]:
    """Axes as ascending non-negative integers; none means all."""
    items = value if isinstance(value, (list, tuple)) else [value]
    found = tuple(sorted(int(axis) % rank for axis in items)) if rank else ()
    return found or tuple(range(rank))


def _elementwise(builder: Builder, call: Call) -> list[Ref]:
    first = call.operand(0)
    call.only_literals(1)
    if isinstance(first, Stored) and call.name in ("assign", "cast", "share_data"):
        return [first]
    source = builder.tensor(first)
    if builder.shapes[source] != call.shape:
        raise Unsupported
    scales = call.name == "dropout" and call.attrs.get("mode") == "downgrade_in_infer"  # at inference too
    return [Active(builder.one("elementwise", (source,), call.shape, op="scale" if scales else call.name))]


def _binary(builder: Builder, call: Call) -> list[Ref]:
    left, right = call.operands
    if call.name == "add" and (folded := _bias(builder, call, left, right)):
        return [folded]
    for ref, other in ((left, right), (right, left)):
        if isinstance(other, Literal) and prod(other.shape) == 1 and isinstance(ref, Active):
            if builder.shapes[ref.tensor] != call.shape:
                raise Unsupported
            return [Active(builder.one("elementwise", (ref.tensor,), call.shape, op=BINARY[call.name]))]
    inputs = (builder.tensor(left), builder.tensor(right))
    return [Active(builder.one("binary", inputs, call.shape, op=BINARY[call.name]))]


def _bias(builder: Builder, call: Call, left: Ref | None, right: Ref | None) -> Ref | None:
    """The layer's own output, where the operation adds a vector of its channels to a convolution or linear layer."""
    for made, stored in ((left, right), (right, left)):
        if not isinstance(made, Active) or not isinstance(stored, Stored) or made.tensor not in builder.foldable:
            continue
        node = builder.nodes[builder.foldable[made.tensor]]
        shape = builder.shapes[made.tensor]
        axis = 1 if node.kind == "conv" else len(shape) - 1
        wanted = tuple(shape[axis] if index == axis else 1 for index in range(len(shape)))
        padded = (1,) * (len(shape) - len(stored.shape)) + stored.shape
        vector = stored.origin == (shape[axis],) and stored.reshaped_only and padded == wanted
        if vector and call.shape == shape and stored.entry is not None:
            builder.add_bias(made.tensor, stored.entry.name)
            return made
    return None


@handles("pool2d", "pool3d", "max_pool2d_with_index", "max_pool3d_with_index")
def _pool(builder: Builder, call: Call) -> list[Ref]:
    op = str(channels_first(call).get("pooling_type", "max"))
    return [Active(builder.one("pool", (builder.tensor(call.operand(0)),), call.shape, op=op))]


@handles(*RESIZES)
def _resize(builder: Builder, call: Call) -> list[Ref]:
    channels_first(call)
    call.only_literals(1)
    return [Active(builder.one("resize", (builder.tensor(call.operand(0)),), call.shape))]


@handles("mean", "sum", "max", "min", "amax", "amin", "mean_all")
def _reduce(builder: Builder, call: Call) -> list[Ref]:
    attrs = call.attrs
    source = builder.tensor(call.operand(0))
    rank = len(builder.shapes[source])
    given = call.literal(1) if len(call.operands) > 1 else attrs.get("axis", [])
    keepdims = bool(attrs.get("keepdim", False))
    op = call.name.removeprefix("a").removesuffix("_all")
    made = builder.one("reduce", (source,), call.shape, op=op, axes=axes_of(given, rank), keepdims=keepdims)
    return [Active(made)]


@handles("p_norm")
def _norm(builder: Builder, call: Call) -> list[Ref]:
    attrs, source = call.attrs, builder.tensor(call.operand(0))
    rank = len(builder.shapes[source])
    axes = tuple(range(rank)) if attrs["asvector"] else (int(attrs["axis"]) % rank,)
    keepdims = bool(attrs["keepdim"])
    return [Active(builder.one("reduce", (source,), call.shape, op="norm", axes=axes, keepdims=keepdims))]


@handles("flip", "repeat_interleave")
def _along_space(builder: Builder, call: Call) -> list[Ref]:
    """Turned round, or entries repeated, along spatial axes: a resize says of any channels what these do to them."""
    source, rank = builder.tensor(call.operand(0)), len(call.shape)
    given = call.attrs["axis"]
    axes = [int(axis) % rank for axis in (given if isinstance(given, (list, tuple)) else [given])]
    if rank < 2 or rank != len(builder.shapes[source]) or 1 in axes:
        raise Unsupported
    return [Active(builder.one("resize", (source,), call.shape, op=call.name))]


@handles("softmax", "log_softmax")
def _softmax(builder: Builder, call: Call) -> list[Ref]:
    axis = int(call.attrs["axis"]) % len(call.shape)
    return [Active(builder.one("softmax", (builder.tensor(call.operand(0)),), call.shape, axis=axis))]


@handles("prelu")
def _prelu(builder: Builder, call: Call) -> list[Ref]:
    """The slopes broadcast over the channel axis."""
    attrs = channels_first(call)
    source, slopes = builder.tensor(call.operand(0)), call.operand(1)
    own = slopes.entry if isinstance(slopes, Stored) else None
    if own is None and isinstance(slopes, (Literal, Stored)) and prod(slopes.shape) == 1:
        return [Active(builder.one("elementwise", (source,), call.shape, op="prelu"))]
    if not isinstance(slopes, Stored) or attrs["mode"] == "element":
        raise Unsupported
    wanted = (1, prod(slopes.shape), *(1,) * (len(call.shape) - 2))
    inputs = (source, builder.tensor(slopes.then("reshape", wanted)))
    return [Active(builder.one("binary", inputs, call.shape, op="prelu"))]


@handles("channel_shuffle")
def _channel_shuffle(builder: Builder, call: Call) -> list[Ref]:
    groups = int(channels_first(call)["groups"])
    count, channels, height, width = call.shape
    parted = (count, groups, channels // groups, height, width)
    made = builder.one("reshape", (builder.tensor(call.operand(0)),), parted)
    swapped = (count, channels // groups, groups, height, width)
    made = builder.one("transpose", (made,), swapped, perm=(0, 2, 1, 3, 4))
    return [Active(builder.one("reshape", (made,), call.shape))]


@handles("pixel_shuffle")
def _pixel_shuffle(builder: Builder, call: Call) -> list[Ref]:
    factor = int(channels_first(call)["upscale_factor"])
    source = builder.tensor(call.operand(0))
    count, _, height, width = builder.shapes[source]
    channels = call.shape[1]
    made = builder.one("reshape", (source,), (count, channels, factor, factor, height, width))
    swapped = (count, channels, height, factor, width, factor)
    made = builder.one("transpose", (made,), swapped, perm=(0, 1, 4, 2, 5, 3))
    return [Active(builder.one("reshape", (made,), call.shape))]


@handles("pixel_unshuffle")
def _pixel_unshuffle(builder: Builder, call: Call) -> list[Ref]:
    factor = int(channels_first(call)["downscale_factor"])
    source = builder.tensor(call.operand(0))
    count, channels = builder.shapes[source][:2]
    height, width = call.shape[2:]
    made = builder.one("reshape", (source,), (count, channels, height, factor, width, factor))
    swapped = (count, channels, factor, factor, height, width)
    made = builder.one("transpose", (made,), swapped, perm=(0, 1, 3, 5, 2, 4))
    return [Active(builder.one("reshape", (made,), call.shape))]
