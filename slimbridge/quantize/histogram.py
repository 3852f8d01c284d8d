"""What a batch says of a tensor: the definition of `Statistics`, and what can be computed from a `Histogram`."""

from __future__ import annotations

from math import frexp, isfinite, ldexp

import numpy as np
from numpy.typing import NDArray

from slimbridge.ports import HISTOGRAM_BINS, Array, Histogram, Statistics, as_float64

HALF = HISTOGRAM_BINS // 2
SMALLEST = -126
"""The smallest exponent of a histogram, that of the smallest normal float32 number."""


def statistics_of(array: Array, histogram: bool = False) -> Statistics:
    """The statistics of one tensor, as a backend's `reduce` gives them.

    Args:
        array: shape (samples, ...), or () for one sample of one entry; at least one entry.
        histogram: count the entries too.
    """
    values = as_float64(array)
    rows = np.abs(values).reshape(len(values) if values.ndim else 1, -1)
    low, high = float(values.min()), float(values.max())
    counted = histogram_of(values) if histogram and isfinite(low) and isfinite(high) else None
    return Statistics(low, high, float(rows.max(axis=1).mean()), counted)


def histogram_of(values: Array) -> Histogram:
    """Counts of finite entries: bin floor(x * 2**-exponent * BINS/2) + BINS/2, the last one for x = 2**exponent."""
    reals = as_float64(values).ravel()
    exponent = exponent_of(float(np.abs(reals).max()))
    index = np.floor(np.ldexp(reals, -exponent) * HALF).astype(np.int64) + HALF
    return Histogram(exponent, np.bincount(np.minimum(index, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS))


def exponent_of(absmax: float) -> int:
    """The smallest whole number e with absmax <= 2**e, -126 at least."""
    mantissa, exponent = frexp(absmax)
    return max(exponent - (mantissa == 0.5), SMALLEST) if absmax > 0 else SMALLEST


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of both tensors' entries, over the larger of the two ranges.

    Exact, as bins about 0 are added up by powers of two; an entry that was the end of the smaller range itself is
    counted one bin below its own.
    """
    exponent = max(a.exponent, b.exponent)
    return Histogram(exponent, _widened(a, exponent) + _widened(b, exponent))


def _widened(histogram: Histogram, exponent: int) -> NDArray[np.int64]:
    counts = np.asarray(histogram.counts, np.int64)
    shift = exponent - histogram.exponent
    if not shift:
        return counts
    place = HALF + (np.arange(-HALF, HALF) >> min(shift, 62))  # rounds down: -1 stays below 0
    wide = np.zeros(HISTOGRAM_BINS, np.int64)
    np.add.at(wide, place, counts)
    return wide


def bin_width(histogram: Histogram) -> float:
    """Width of a bin, real units."""
    return ldexp(1.0, histogram.exponent) / HALF


def edges(histogram: Histogram) -> NDArray[np.float64]:
    """Lower ends of the bins, and the upper end of the last; real units, shape (BINS + 1,)."""
    return np.arange(-HALF, HALF + 1) * bin_width(histogram)


def magnitudes(histogram: Histogram) -> NDArray[np.int64]:
    """Counts of the magnitudes, from 0 up, in bins of the same width, shape (BINS / 2,)."""
    counts = np.asarray(histogram.counts, np.int64)
    return counts[HALF:] + counts[:HALF][::-1]
