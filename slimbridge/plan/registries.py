"""The registries: importances, observers, losses, schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from slimbridge.plan.registry import Registry
from slimbridge.ports import Array, Tensor

Importance = Callable[[Array], Array]
"""From a weight (out, in, ...) to the importance of each output channel, float64, shape (out,), 0 or more."""

Schedule = Callable[[float], float]
"""From the share of training done (0..1) to a factor of the learning rate."""


class Observer(Protocol):
    """Collects the range of one tensor over calibration batches."""

    def update(self, extremes: dict[str, float]) -> None:
        """One batch's {"absmax", "min", "max"}."""

    def threshold(self) -> float:
        """Largest magnitude to represent, real units; 0 before any update."""


@dataclass(frozen=True)
class DistillLoss:
    """A loss term.

    Attributes:
        function: (ops, student, other, **options) -> scalar tensor; `other` is what `against` says.
        against: "labels" (integer targets), "teacher" (the teacher's logits) or "feature" (its feature map).
        uses_temperature: does it take the option `temperature`?
        source: paper or file that defines it.
    """

    function: Callable[..., Tensor]
    against: Literal["labels", "teacher", "feature"]
    uses_temperature: bool
    source: str


IMPORTANCES: Registry[Importance] = Registry("importance", "slimbridge.prune.importances")
OBSERVERS: Registry[Callable[..., Observer]] = Registry("observer", "slimbridge.quantize.observers")
LOSSES: Registry[DistillLoss] = Registry("loss", "slimbridge.distill.losses")
SCHEDULES: Registry[Callable[..., Schedule]] = Registry("schedule", "slimbridge.train.schedules")
ALL: tuple[Registry[Any], ...] = (IMPORTANCES, OBSERVERS, LOSSES, SCHEDULES)
