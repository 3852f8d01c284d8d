"""The registries: importances, observers, losses, schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from slimbridge.plan.registry import Registry
from slimbridge.ports import Array, Statistics, Tensor

Needs = Literal["weights", "gradients", "squared_gradients", "activations"]


@dataclass(frozen=True)
class Rows:
    """One coupled axis of one parameter: row i belongs to entry i of that axis.

    Attributes:
        parameter: canonical name.
        role: "weight", "bias", "running_mean", ...
        kind: of the layer: "conv", "linear", "batch_norm", ...; "constant" for a parameter outside any layer.
        side: "out" (the axis is the layer's output channels), "in" (its input channels), "norm" (any other vector
            that channels pass through: normalisation, depthwise convolution, a parameter of its own).
        weight: shape (rows, ...): the parameter with that axis first.
        gradient: mean gradient over the calibration batches, same shape; None unless it is needed.
        squared_gradient: mean over the calibration batches of the squared gradient, same shape; likewise.
        activation: "mean" (mean magnitude) and "apoz" (share of zeros) of each output channel, shape (rows,);
            None unless it is needed, and for other sides than "out".
        seed: of importances that draw.
    """

    parameter: str
    role: str
    kind: str
    side: Literal["out", "in", "norm"]
    weight: Array
    gradient: Array | None = None
    squared_gradient: Array | None = None
    activation: Mapping[str, Array] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Importance:
    """A criterion for channels.

    Attributes:
        score: (rows, **options) -> importance of each row, float64, shape (rows,), 0 or more.
        needs: what must be collected beside the weights.
        rated: which coupled axes count unless the plan says: "producers" (weights that make the channels), "coupled"
            (also normalisations and the weights that read them), "norms" (BatchNorm scales alone).
        group_reduction: over the rated axes, unless the plan says.
        root: the reduced importance is raised to 1 / root.
        normalisation: unless the plan says: a word of the plan, or "total" (divided by the sum over all groups).
        source: paper or file that defines it.
    """

    score: Callable[..., Array]
    needs: Needs = "weights"
    rated: Literal["producers", "coupled", "norms"] = "producers"
    group_reduction: Literal["master", "mean", "sum", "max"] = "mean"
    root: float = 1.0
    normalisation: str | None = None
    source: str = ""


@dataclass(frozen=True)
class EntryImportance:
    """A criterion for single entries of a weight, for masks.

    Attributes:
        score: (rows, **options) -> float64, the shape of `rows.weight`, 0 or more; `rows` has side "out".
        needs: what must be collected beside the weights.
        source: paper or file that defines it.
    """

    score: Callable[..., Array]
    needs: Needs = "weights"
    source: str = ""


def as_importance(entry: Importance | Callable[[Array], Array]) -> Importance:
    """The entry itself; a plain function of a weight (rows, ...) becomes one that rates the producers' weights."""
    if isinstance(entry, Importance):
        return entry
    function = entry
    return Importance(lambda rows: function(rows.weight))


Schedule = Callable[[float], float]
"""From the share of training done (0..1) to a factor of the learning rate."""


@dataclass(frozen=True)
class Scheme:
    """How integers stand for reals, before any tensor was seen.

    Attributes:
        bits: word length, 2..8.
        symmetric: 0 is in the middle of the grid, else the grid reaches from the smallest to the largest value.
        weight: is it a weight's? Weights leave the lowest integer out, so that the grid is the same on both sides of 0.
        definition: whose conventions, see `slimbridge.quantize.grid`.
    """

    bits: int = 8
    symmetric: bool = True
    weight: bool = False
    definition: Literal["own", "paddle", "torch"] = "own"


class Observer(Protocol):
    """Collects the range of one tensor over calibration batches, and keeps a few numbers only.

    Attributes:
        needs_histogram: does it look at `Statistics.histogram`?
    """

    needs_histogram: bool

    def update(self, statistics: Statistics) -> None:
        """One batch."""

    def limits(self, scheme: Scheme) -> tuple[float, float]:
        """Smallest and largest value to represent, real units, low <= high; (0, 0) before any update.

        For a symmetric scheme the larger magnitude of the two counts.
        """


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


IMPORTANCES: Registry[Importance | Callable[[Array], Array]] = Registry("importance", "slimbridge.prune.importances")
ENTRY_IMPORTANCES: Registry[EntryImportance] = Registry("entry importance", "slimbridge.prune.entries")
OBSERVERS: Registry[Callable[..., Observer]] = Registry("observer", "slimbridge.quantize.observers")
LOSSES: Registry[DistillLoss] = Registry("loss", "slimbridge.distill.losses")
SCHEDULES: Registry[Callable[..., Schedule]] = Registry("schedule", "slimbridge.train.schedules")
ALL: tuple[Registry[Any], ...] = (IMPORTANCES, ENTRY_IMPORTANCES, OBSERVERS, LOSSES, SCHEDULES)
