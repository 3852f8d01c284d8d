"""What a value of a Paddle program stands for while the graph is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from slimbridge_paddle.names import Entry


class Unsupported(Exception):  # noqa: N818
    """The operation has no place in the neutral graph and becomes an `unknown` node."""


@dataclass(frozen=True)
class Active:
    """A tensor of the graph."""

    tensor: int


@dataclass(frozen=True)
class Step:
    """A rearrangement of a stored tensor: the node's kind, the shape after it and its attributes."""

    kind: str
    shape: tuple[int, ...]
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer, possibly rearranged; `entry` is None when the model does not save it.

    Attributes:
        entry: its canonical name and layout.
        origin: its shape as Paddle stores it.
        steps: what was done to it since.
    """

    entry: Entry | None
    origin: tuple[int, ...]
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape now."""
        return self.steps[-1].shape if self.steps else self.origin

    def then(self, kind: str, shape: tuple[int, ...], **attrs: Any) -> Stored:
        """The same, rearranged once more."""
        return replace(self, steps=(*self.steps, Step(kind, shape, tuple(attrs.items()))))

    @property
    def reshaped_only(self) -> bool:
        """Is it still the same entries in the same order?"""
        return all(step.kind == "reshape" for step in self.steps)


@dataclass(frozen=True)
class Literal:
    """A number or a list that the program holds; `value` is None where it is not worth knowing.

    `like` is the tensor of the graph that it takes its shape from, as `zeros_like` makes it.
    """

    shape: tuple[int, ...]
    value: Any = None
    like: int | None = None


@dataclass(frozen=True)
class Bundle:
    """Several values in one."""

    items: Sequence[Ref]


Ref: TypeAlias = Active | Stored | Literal | Bundle
