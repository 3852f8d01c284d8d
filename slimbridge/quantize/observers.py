"""Observers: from each batch's statistics to the range of a tensor. Nothing but a few numbers is kept."""

from __future__ import annotations

from slimbridge.errors import SlimbridgeError
from slimbridge.plan.registries import OBSERVERS, Scheme
from slimbridge.ports import Statistics
from slimbridge.quantize.extremes import Extremes
from slimbridge.quantize.histogram_observers import Emd, Kl, Mse, Percentile, Share

__all__ = ["Absmax", "Avg", "Emd", "Kl", "MinMax", "MovingAverage", "Mse", "Percentile", "Share"]


@OBSERVERS.register("minmax")
class MinMax(Extremes):
    """The smallest and the largest value over all batches.

    Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 2;
    torch.ao.quantization's MinMaxObserver (PyTorch 2.13).
    """

    def limits(self, scheme: Scheme) -> tuple[float, float]:
        """Smallest and largest value, whatever the scheme."""
        return self.min, self.max


@OBSERVERS.register("absmax")
class Absmax(Extremes):
    """The largest magnitude over all batches, on both sides of 0.

    Source: PaddleSlim 2.6's AbsmaxObserver, without its floor of 1e-7.
    """

    def limits(self, scheme: Scheme) -> tuple[float, float]:
        """-absmax .. absmax, from 0 where no value is negative."""
        return self.around_zero(self.absmax)


@OBSERVERS.register("avg")
class Avg(Extremes):
    """Mean over the batches of the mean over a batch's samples of the sample's largest magnitude.

    Source: PaddleSlim 2.6's AVGObserver.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sum = 0.0

    def update(self, statistics: Statistics) -> None:
        """One batch."""
        super().update(statistics)
        self._sum += statistics.mean_absmax

    def limits(self, scheme: Scheme) -> tuple[float, float]:
        """-mean .. mean, from 0 where no value is negative."""
        return self.around_zero(self._sum / max(self.batches, 1))


@OBSERVERS.register("moving_average")
class MovingAverage(Extremes):
    """Exponential moving averages of the batches' extremes: value <- rate * value + (1 - rate) * new.

    Args:
        rate: share of the old value kept, 0 to below 1.
        start: "first": smallest and largest value are averaged each, from the first batch's, as
            torch.ao.quantization's MovingAverageMinMaxObserver does (PyTorch 2.13, averaging_constant = 1 - rate).
            "paddle": the largest magnitude is averaged as Paddle's moving_average_abs_max operator does, accum <-
            rate * accum + absmax and state <- rate * state + 1, both from 1, threshold = accum / state; symmetric
            schemes only.
    """

    def __init__(self, rate: float = 0.9, start: str = "first") -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise SlimbridgeError(f"observer 'moving_average': rate must be 0 to below 1, found {rate}")
        if start not in ("first", "paddle"):
            raise SlimbridgeError(f"observer 'moving_average': start must be 'first' or 'paddle', found '{start}'")
        self._rate, self._start = rate, start
        self._low = self._high = 0.0
        self._state = self._accum = 1.0

    def update(self, statistics: Statistics) -> None:
        """One batch."""
        rate = self._rate if self.batches else 0.0
        super().update(statistics)
        self._low = rate * self._low + (1 - rate) * statistics.min
        self._high = rate * self._high + (1 - rate) * statistics.max
        self._accum = self._rate * self._accum + statistics.absmax
        self._state = self._rate * self._state + 1

    def limits(self, scheme: Scheme) -> tuple[float, float]:
        """The averages so far; SlimbridgeError for start 'paddle' with an asymmetric scheme."""
        if self._start == "first" or not self.batches:
            return self._low, self._high
        if not scheme.symmetric:
            raise SlimbridgeError("observer 'moving_average': start 'paddle' averages magnitudes, for symmetric only")
        return self.around_zero(self._accum / self._state)
