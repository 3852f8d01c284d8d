"""What every observer keeps."""

from __future__ import annotations

from math import isfinite

from slimbridge.errors import SlimbridgeError
from slimbridge.ports import Statistics


class Extremes:
    """Smallest and largest value over all batches, which every observer keeps.

    Attributes:
        needs_histogram: does it look at `Statistics.histogram`?
        batches: number of updates.
        min, max: real units, 0 before any update.
    """

    needs_histogram = False

    def __init__(self) -> None:
        self.batches = 0
        self.min = self.max = 0.0

    def update(self, statistics: Statistics) -> None:
        """One batch; SlimbridgeError when it is not finite."""
        if not (isfinite(statistics.min) and isfinite(statistics.max)):
            raise SlimbridgeError(f"an observed tensor is not finite: found {statistics.min} .. {statistics.max}")
        self.min = min(self.min, statistics.min) if self.batches else statistics.min
        self.max = max(self.max, statistics.max) if self.batches else statistics.max
        self.batches += 1

    @property
    def absmax(self) -> float:
        """Largest magnitude so far."""
        return max(-self.min, self.max)

    def around_zero(self, threshold: float) -> tuple[float, float]:
        """-threshold .. threshold, or 0 .. threshold where no value is negative."""
        return (-threshold if self.min < 0 else 0.0), threshold
