"""Observers that look at how often values occur, all from one histogram that the batches are merged into.

Entries are taken as spread evenly over their bin. A search compares candidate ranges by the very grid that
`slimbridge.quantize.grid.grid_of` makes of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import QuantParams
from slimbridge.errors import SlimbridgeError
from slimbridge.plan.registries import OBSERVERS, Scheme
from slimbridge.ports import Array, Histogram, Statistics, as_float64
from slimbridge.quantize.extremes import Extremes
from slimbridge.quantize.grid import grid_of
from slimbridge.quantize.histogram import bin_width, edges, magnitudes, merge

Limits = tuple[float, float]
COARSE = 2.0 ** (-np.arange(64) / 8)
"""Shares of the full range that `mse` compares first: down to 1/235, each 8.3 % below the one before."""
FINE = 2.0 ** np.linspace(1 / 8, -1 / 8, 33)
"""Factors of the best of them that it compares next, up to its neighbours."""
MESHES = (2.0 ** (-np.arange(16) / 2), 2.0 ** np.linspace(1 / 2, -1 / 2, 15), 2.0 ** np.linspace(1 / 14, -1 / 14, 9))
"""Shares of the full range, and then factors of the best, of each end of an asymmetric range."""
FIFTIETHS = np.arange(50, 14, -1) / 50
"""Shares of the full range that `emd` compares: 1, 0.98 .. 0.3."""
BLOCK = 16
"""Ranges that a search compares at once, few enough for a processor's cache."""
STRIDE = 16
"""Bins between the thresholds that `kl` compares."""


class Merged(Extremes, ABC):
    """An observer with one histogram of all batches."""

    needs_histogram = True

    def __init__(self) -> None:
        super().__init__()
        self.histogram: Histogram | None = None

    def update(self, statistics: Statistics) -> None:
        """One batch; ValueError when it comes without a histogram."""
        super().update(statistics)
        if statistics.histogram is None:
            raise ValueError("this observer needs a histogram")
        self.histogram = merge(self.histogram, statistics.histogram) if self.histogram else statistics.histogram

    def limits(self, scheme: Scheme) -> Limits:
        """Smallest and largest value to represent; (0, 0) before any update, and for a tensor of zeros."""
        if self.histogram is None or self.absmax == 0:
            return 0.0, 0.0
        low, high = self.find(self.histogram, scheme)
        return float(low), float(high)

    @abstractmethod
    def find(self, histogram: Histogram, scheme: Scheme) -> Limits:
        """`limits` where there is something to look at."""

    def _within(self, value: float) -> float:
        """Not beyond what was seen: an entry at the end of a histogram's range is counted below its own bin."""
        return min(max(value, self.min), self.max)

    def full(self, scheme: Scheme) -> Limits:
        """The range that no search exceeds: all values and 0."""
        return self.around_zero(self.absmax) if scheme.symmetric else (min(self.min, 0.0), max(self.max, 0.0))


@OBSERVERS.register("histogram")
class Share(Merged):
    """The middle of the first bin up to which a share of the entries is counted.

    Of magnitudes under a symmetric scheme (Paddle 3.3's PostTrainingQuantization, algorithm "hist"), else of values
    from below and, for the lower end, from above (PaddleSlim 2.6's HistObserver, which takes the bin before).

    Args:
        hist_percent: the share, above 0.5, to 1.
    """

    def __init__(self, hist_percent: float = 0.99999) -> None:
        super().__init__()
        if not 0.5 < hist_percent <= 1:
            raise SlimbridgeError(f"observer 'histogram': hist_percent must be above 0.5, to 1, found {hist_percent}")
        self._share = hist_percent

    def find(self, histogram: Histogram, scheme: Scheme) -> Limits:
        """See the class."""
        width = bin_width(histogram)
        if scheme.symmetric:
            middle = (_covering(magnitudes(histogram), self._share) + 0.5) * width
            return self.around_zero(min(middle, self.absmax))
        ends, counts = edges(histogram), histogram.counts
        high = ends[_covering(counts, self._share)] + width / 2
        low = ends[-1 - _covering(counts[::-1], self._share)] - width / 2
        return self._within(low), self._within(high)


@OBSERVERS.register("percentile")
class Percentile(Merged):
    """The narrowest range, in whole bins, that holds so many percent of the entries.

    Of magnitudes under a symmetric scheme; else half of the others are left out at either end.
    Source: ONNX Runtime 1.32's PercentileCalibrater, which takes the inner end of the last bin instead of the outer.

    Args:
        percentile: above 0, to 100.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 0 < percentile <= 100:
            raise SlimbridgeError(f"observer 'percentile': percentile must be above 0, to 100, found {percentile}")
        self._share = percentile / 100

    def find(self, histogram: Histogram, scheme: Scheme) -> Limits:
        """See the class."""
        if scheme.symmetric:
            outer = (_covering(magnitudes(histogram), self._share) + 1) * bin_width(histogram)
            return self.around_zero(min(outer, self.absmax))
        ends, counts, share = edges(histogram), histogram.counts, (1 + self._share) / 2
        high, low = ends[_covering(counts, share) + 1], ends[-2 - _covering(counts[::-1], share)]
        return self._within(low), self._within(high)


def _covering(counts: Array, share: float) -> int:
    """The first bin up to which that share of the entries is counted."""
    summed = np.cumsum(counts)
    needed = round(share * float(summed[-1]), 6)  # 99.9 / 100 of 32,000 entries are 31,968 of them, not a hair more
    return min(int(np.searchsorted(summed, needed)), len(summed) - 1)


class Search(Merged):
    """The candidate range with the smallest loss; the widest of equal ones."""

    @abstractmethod
    def loss(self, histogram: Histogram, grid: QuantParams) -> Array:
        """What each of a grid's steps loses, shape (steps,)."""

    def best(self, histogram: Histogram, scheme: Scheme, lows: Array, highs: Array) -> Limits:
        """Of candidates, wide ones first."""
        losses = []
        for i in range(0, len(lows), BLOCK):
            grid = grid_of(lows[i : i + BLOCK], highs[i : i + BLOCK], scheme, axis=0)
            losses.append(self.loss(histogram, grid))
        found = int(np.argmin(np.concatenate(losses)))
        return float(lows[found]), float(highs[found])


@OBSERVERS.register("mse")
class Mse(Search):
    """The range with the smallest mean squared error of the quantized values.

    The full range is scaled by `COARSE`, then by `FINE` about the best; under an asymmetric scheme each end by the
    three `MESHES`, in all pairs. The loss has an exact form, see `squared_error`.
    Source: Sung et al. 2015, "Resiliency of deep neural networks under quantization"; PaddleSlim 2.6's
    MSEObserver compares 0.3 to 1 times the absmax of each batch.
    """

    def loss(self, histogram: Histogram, grid: QuantParams) -> Array:
        """Mean squared error."""
        return squared_error(histogram, grid)

    def find(self, histogram: Histogram, scheme: Scheme) -> Limits:
        """See the class."""
        least, most = self.full(scheme)
        if not scheme.symmetric and least < 0 < most:
            low, high = least, most
            for mesh in MESHES:
                lows, highs = np.meshgrid(np.maximum(low * mesh, least), np.minimum(high * mesh, most))
                low, high = self.best(histogram, scheme, lows.ravel(), highs.ravel())
            return low, high
        low, high = self.best(histogram, scheme, least * COARSE, most * COARSE)
        return self.best(histogram, scheme, np.maximum(low * FINE, least), np.minimum(high * FINE, most))


@OBSERVERS.register("emd")
class Emd(Search):
    """The range that changes mean and standard deviation least: the sum of both differences.

    Source: PaddleSlim 2.6's EMDObserver, with its candidates 0.3, 0.32 .. 1; it takes them of the largest value
    instead of the largest magnitude, and the best of all batches' own losses.
    """

    def loss(self, histogram: Histogram, grid: QuantParams) -> Array:
        """|mean(x) - mean(q)| + |std(x) - std(q)|."""
        mean, deviation = quantized_moments(histogram, grid)
        width, total = bin_width(histogram), histogram.counts.sum()
        middles = edges(histogram)[:-1] + width / 2
        centre = histogram.counts @ middles / total
        spread = np.sqrt(histogram.counts @ (middles - centre) ** 2 / total + width**2 / 12)
        return np.asarray(np.abs(mean - centre) + np.abs(deviation - spread))

    def find(self, histogram: Histogram, scheme: Scheme) -> Limits:
        """See the class."""
        low, high = self.full(scheme)
        return self.best(histogram, scheme, low * FIFTIETHS, high * FIFTIETHS)


@OBSERVERS.register("kl")
class Kl(Merged):
    """The threshold whose quantized histogram of magnitudes has the smallest divergence from the clipped one.

    For each threshold, `STRIDE` bins apart and moved down to the end of a bin that is not empty: P holds the bins
    below it, what is beyond counted in the last; Q the same bins, summed up to as many levels as the grid has
    integers on the larger side of 0 (128 for 8 bits), each level spread evenly over its bins that P does not leave
    empty; the smallest sum of P log(P / Q) wins.
    Source: Migacz 2017, "8-bit inference with TensorRT", GTC S7310. The bin at 0 is given the
    height of the next, as zeros are exact on any grid (NVIDIA's pytorch-quantization). ONNX Runtime's
    EntropyCalibrater takes 128 levels for both signs together.
    """

    def find(self, histogram: Histogram, scheme: Scheme) -> Limits:
        """See the class; an asymmetric range is cut at the threshold on both sides."""
        least, most = self.full(scheme)
        grid = grid_of(least, most, scheme)
        levels = max(grid.high - grid.zero_point[0], grid.zero_point[0] - grid.low)
        counts = magnitudes(histogram).astype(np.float64)
        counts[0] = counts[1]
        sizes = _sizes(counts, levels)
        losses = [_divergence(counts, int(size), levels) for size in sizes]
        threshold = float(sizes[int(np.argmin(losses))]) * bin_width(histogram)
        return max(least, -threshold), min(most, threshold)


def _sizes(counts: Array, levels: int) -> NDArray[np.int64]:
    """Numbers of bins, ascending, each up to one that is not empty; at least as many as levels, or all."""
    ends = np.flatnonzero(counts) + 1
    if not ends.size:
        return np.array([len(counts)])
    wanted = np.arange(levels, ends[-1], STRIDE)
    moved = ends[np.maximum(np.searchsorted(ends, wanted, side="right") - 1, 0)]
    return np.asarray(np.unique(np.append(moved[moved >= levels], ends[-1])))


def _divergence(counts: Array, size: int, levels: int) -> float:
    """Sum of P log(P / Q) of the first `size` bins, of which the last is not empty."""
    clipped = counts[:size].copy()
    clipped[-1] += counts[size:].sum()
    filled = clipped > 0
    if not filled.any():
        return 0.0
    starts = np.unique(-(-np.arange(levels) * size // levels))
    starts = starts[starts < size]  # fewer bins than levels, of a tensor near the smallest floats
    height = np.add.reduceat(counts[:size], starts) / np.maximum(np.add.reduceat(filled.astype(np.float64), starts), 1)
    spread = np.repeat(height, np.diff(starts, append=size))[filled]
    share = clipped[filled] / clipped.sum()
    return float(share @ np.log(share / (spread / spread.sum())))


def squared_error(histogram: Histogram, grid: QuantParams) -> NDArray[np.float64]:
    """Mean of (x - q(x))**2 on each of a grid's steps, exact for entries spread evenly over their bins.

    With v = x / step and r the integer (less the zero point) that v is rounded and clipped to, r / 12 + (v - r)**3 / 3
    is the integral of (v - r)**2 from 0 to v: 1/12 for each whole step, and the rest.
    """
    ends, weights = _ends(histogram)
    step, scaled, rounded = _on_grid(ends, grid)
    rest = scaled - rounded
    return np.asarray((rounded @ weights / 12 + (rest * rest * rest) @ weights / 3) * step**3)


def quantized_moments(histogram: Histogram, grid: QuantParams) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of q(x) on each of a grid's steps, likewise.

    The integrals of r and r**2 from 0 to v are r v - r**2 / 2 and r**2 v - r (4 r**2 - 1) / 6.
    """
    ends, weights = _ends(histogram)
    step, scaled, rounded = _on_grid(ends, grid)
    mean = ((rounded * scaled - rounded**2 / 2) @ weights) * step**2
    square = ((rounded**2 * scaled - rounded * (4 * rounded**2 - 1) / 6) @ weights) * step**3
    return mean, np.sqrt(np.maximum(square - mean**2, 0))


def _ends(histogram: Histogram) -> tuple[Array, Array]:
    """Ends of bins, and weights that turn an integral's values there into the mean over all entries."""
    counts = as_float64(histogram.counts)
    weights = -np.diff(counts, prepend=0, append=0) / (counts.sum() * bin_width(histogram))
    needed = np.flatnonzero(weights)
    return edges(histogram)[needed], weights[needed]


def _on_grid(reals: Array, grid: QuantParams) -> tuple[Array, Array, Array]:
    """Steps (steps,), and (steps, reals): reals in steps, unrounded and on the grid."""
    step, zero = np.array(grid.step, np.float64), np.array(grid.zero_point, np.float64)[:, None]
    scaled = reals / step[:, None]
    rounded = np.rint(scaled)
    return step, scaled, np.clip(rounded, grid.low - zero, grid.high - zero, out=rounded)
