"""Observers: from each batch's extremes to a threshold. Nothing but a few numbers is kept."""

from __future__ import annotations

from slimbridge.errors import SlimbridgeError
from slimbridge.plan.registries import OBSERVERS


@OBSERVERS.register("absmax")
class Absmax:
    """The largest magnitude over all batches.

    Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 2.
    """

    def __init__(self) -> None:
        self._largest = 0.0

    def update(self, extremes: dict[str, float]) -> None:
        """Take one batch's {"absmax": ...}."""
        self._largest = max(self._largest, extremes["absmax"])

    def threshold(self) -> float:
        """Largest magnitude seen, real units."""
        return self._largest


@OBSERVERS.register("moving_average")
class MovingAverage:
    """Exponential moving average of the batches' largest magnitudes: t <- rate * t + (1 - rate) * absmax.

    It starts at the first batch's value, as torch.ao.quantization's MovingAverageMinMaxObserver does (PyTorch 2.13,
    averaging_constant = 1 - rate). Paddle's moving_average_abs_max starts its accumulators at 1 instead.

    Args:
        rate: share of the old value kept, 0 to below 1.
    """

    def __init__(self, rate: float = 0.9) -> None:
        if not 0 <= rate < 1:
            raise SlimbridgeError(f"observer 'moving_average': rate must be 0 to below 1, found {rate}")
        self._rate = rate
        self._value: float | None = None

    def update(self, extremes: dict[str, float]) -> None:
        """Take one batch's {"absmax": ...}."""
        new = extremes["absmax"]
        self._value = new if self._value is None else self._rate * self._value + (1 - self._rate) * new

    def threshold(self) -> float:
        """The average so far, real units; 0 before the first batch."""
        return self._value or 0.0
