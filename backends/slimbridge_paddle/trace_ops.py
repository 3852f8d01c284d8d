"""Paddle's operations (PIR names) -> nodes of the neutral graph, except the layers with weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from slimbridge_paddle.refs import Literal, Ref, Unsupported

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
