"""Statistics of a model's tensors over one pass: extremes, mean magnitudes and exact histograms."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from slimbridge.decisions import Site
from slimbridge.errors import ModelError
from slimbridge.ports import HISTOGRAM_BINS, Array, Histogram, Statistics, tensors_in
from slimbridge_torch.names import find_modules

Tensor = Any

_CHUNK = 1 << 17
_LONG = 1 << 13
"""Entries of a sample from which on one pass over each is faster than two over all; over an axis aminmax is slow."""
_HALF = HISTOGRAM_BINS // 2
_LOWEST = -126


@dataclass
class _Seen:
    """What was seen of one site so far; nothing as large as a tensor is kept."""

    histogram: bool
    low: float = math.inf
    high: float = -math.inf
    absmax: float = 0.0
    samples: int = 0
    exponent: int = _LOWEST
    counts: Array = field(default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64))

    def add(self, x: Tensor) -> None:
        """Take one call's tensor."""
        x = x.detach()
        if x.numel() == 0:
            return
        if x.dtype not in (torch.float32, torch.float64):
            x = x.to(torch.float32 if x.is_floating_point() else torch.float64)
        samples = x.shape[0] if x.ndim else 1
        low, high, absmax = _extremes(x, samples)
        whole = math.isfinite(low) and math.isfinite(high)
        if self.histogram and whole and math.isfinite(self.absmax):
            self._count(x, max(-low, high))
        # Python's min and max would lose a NaN.
        self.low, self.high = float(np.minimum(self.low, low)), float(np.maximum(self.high, high))
        self.absmax += absmax
        self.samples += samples

    def _count(self, x: Tensor, largest: float) -> None:
        exponent = exponent_of(largest)
        counts = _counts(x, exponent)
        top = max(exponent, self.exponent)
        self.counts = coarser(self.counts, top - self.exponent) + coarser(counts, top - exponent)
        self.exponent = top

    def statistics(self) -> Statistics:
        """Of all that was seen."""
        whole = self.histogram and math.isfinite(self.absmax)
        histogram = Histogram(self.exponent, self.counts) if whole else None
        return Statistics(self.low, self.high, self.absmax / self.samples, histogram)


def _extremes(x: Tensor, samples: int) -> tuple[float, float, float]:
    """Smallest and largest entry, and the sum over the samples of the largest magnitude."""
    rows = x.reshape(samples, -1)
    if x.device.type == "cpu" and rows.shape[1] >= _LONG:
        pairs = [torch.aminmax(row) for row in rows.unbind()]
        lows, highs = torch.stack([pair.min for pair in pairs]), torch.stack([pair.max for pair in pairs])
    else:
        lows, highs = torch.amin(rows, 1), torch.amax(rows, 1)
    total = torch.maximum(-lows, highs).sum(dtype=torch.float64)
    low, high, absmax = torch.stack((lows.amin().double(), highs.amax().double(), total)).tolist()
    return low, high, absmax


def exponent_of(largest: float) -> int:
    """The smallest whole number, -126 at least, whose power of two is not below a magnitude."""
    fraction, exponent = math.frexp(largest)
    return max(_LOWEST, exponent - (fraction == 0.5)) if largest else _LOWEST


def _counts(x: Tensor, exponent: int) -> Array:
    """Entries in each bin; the products with powers of two, and rounding down, are exact."""
    counts = torch.zeros(HISTOGRAM_BINS, dtype=torch.int64, device=x.device)
    # In float32 the scale itself must not overflow: then it is applied in two factors.
    power = _HALF.bit_length() - 1 - exponent
    first = min(power, 127)
    parts = x.reshape(-1).split(_CHUNK if x.device.type == "cpu" else x.numel())
    scaled, bins = torch.empty_like(parts[0]), torch.empty_like(parts[0], dtype=torch.int16)
    for part in parts:
        # The same memory for each part: new memory would cost more than the counting.
        scaled, bins = scaled[: len(part)], bins[: len(part)]
        torch.mul(part, 2.0**first, out=scaled)
        if power > first:
            scaled.mul_(2.0 ** (power - first))
        bins.copy_(scaled.floor_()).add_(_HALF).clamp_(max=HISTOGRAM_BINS - 1)
        counts += torch.bincount(bins, minlength=HISTOGRAM_BINS)
    return np.array(counts.cpu().numpy())


def coarser(counts: Array, steps: int) -> Array:
    """The counts over a range 2**steps times as wide: neighbours added, the middle stays the middle."""
    if steps == 0 or not counts.any():
        return counts
    wide = np.zeros_like(counts)
    bins = (np.arange(-_HALF, _HALF) >> min(steps, 62)) + _HALF
    np.add.at(wide, bins, counts)
    return wide


def reduce(
    model: nn.Module, run: Callable[[], object], sites: Sequence[Site], histogram: bool
) -> dict[Site, Statistics]:
    """Statistics of the sites while `run` runs, before their own fake quantization; see the port.

    Raises:
        ModelError: a path that does not exist, or a layer without the weight that a site names.
    """
    modules = find_modules(model, tuple(site.path for site in sites), "reduce")
    seen = {site: _Seen(histogram) for site in sites}
    handles = []
    by_path: dict[str, dict[Site, _Seen]] = {}
    for site, found in seen.items():
        if site.side != "weight":
            by_path.setdefault(site.path, {})[site] = found
            continue
        weight = modules[site.path]._parameters.get("weight")
        if weight is None:
            raise ModelError(f"reduce: layer '{site.path}' has no weight of its own")
        found.add(weight)
    try:
        for path, wanted in by_path.items():
            before, after = _observers(wanted)
            handles.append(modules[path].register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(modules[path].register_forward_hook(after, prepend=True))
        if by_path:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {site: found.statistics() for site, found in seen.items() if found.samples}


def _observers(wanted: Mapping[Site, _Seen]) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks before and after a layer's call."""
    calls: Counter[str] = Counter()

    def look(side: str, tensors: list[Tensor]) -> None:
        for site, seen in wanted.items():
            if site.side == side and site.call in (None, calls[side]) and site.argument < len(tensors):
                seen.add(tensors[site.argument])
        calls[side] += 1

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        look("input", _tensors((args, kwargs)))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        look("output", _tensors(output))

    return before, after


def _tensors(tree: object) -> list[Tensor]:
    return [item for item in tensors_in(tree) if isinstance(item, torch.Tensor)]
