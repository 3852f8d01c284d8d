"""Differences between arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slimbridge.ports import Array, as_float64


def relative(a: Array, b: Array) -> float:
    """Relative L2 difference |a - b| / |b|; infinite where shapes differ or values are not finite, 0 for two zeros."""
    if a.shape != b.shape:
        return float("inf")
    first, second = as_float64(a), as_float64(b)
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return float("inf")
    scale = float(np.linalg.norm(second))
    difference = float(np.linalg.norm(first - second))
    return difference if scale == 0 else difference / scale


def largest(a: Array, b: Array) -> float:
    """Largest absolute difference of entries; infinite where shapes differ or values are not finite."""
    if a.shape != b.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):  # inf - inf is said by the result
        difference = np.abs(as_float64(a) - as_float64(b))
    return float(np.max(difference, initial=0.0)) if np.isfinite(difference).all() else float("inf")


def differing(a: Mapping[str, Array], b: Mapping[str, Array]) -> int:
    """Entries that differ between two sets of named arrays; an array that one side lacks counts whole."""
    count = 0
    for name in a.keys() | b.keys():
        if name not in a or name not in b or a[name].shape != b[name].shape:
            count += int((a[name] if name in a else b[name]).size)
        else:
            count += int(np.count_nonzero(a[name] != b[name]))
    return count
