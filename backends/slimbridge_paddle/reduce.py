"""Statistics of a model's tensors over one batch; nothing of the tensors is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import paddle

from slimbridge.decisions import Site
from slimbridge.errors import ModelError
from slimbridge.ports import HISTOGRAM_BINS, Array, Histogram, Statistics
from slimbridge_paddle.buffers import BLOCK, contiguous, extremes, on_cpu, view
from slimbridge_paddle.names import every_name, find_layers
from slimbridge_paddle.quant import wrapped
from slimbridge_paddle.run import hooked, mode, run

Tensor: TypeAlias = Any
_HALF = HISTOGRAM_BINS // 2


@dataclass(frozen=True)
class Seen:
    """What one or several calls gave.

    Attributes:
        low, high: over all entries.
        absmax: sum over the samples of the largest magnitude in each.
        samples: how many.
        histogram: None where it was not asked for, or an entry is not finite.
    """

    low: float
    high: float
    absmax: float
    samples: int
    histogram: Histogram | None

    def merged(self, other: Seen) -> Seen:
        """Both together."""
        return Seen(
            float(np.minimum(self.low, other.low)),  # Python's own would lose a NaN
            float(np.maximum(self.high, other.high)),
            self.absmax + other.absmax,
            self.samples + other.samples,
            merged(self.histogram, other.histogram) if self.histogram and other.histogram else None,
        )


def reduce(model: Any, inputs: Sequence[Any], sites: Sequence[Site], histogram: bool) -> dict[Site, Statistics]:
    """See `slimbridge.ports.Backend.reduce`; of a quantized tensor, what it is before its own quantization.

    Raises:
        ModelError: a layer does not exist, or has no weight.
    """
    found: dict[Site, Seen] = {}

    def look(site: Site, tensor: Tensor) -> None:
        if 0 not in tensor.shape:
            seen = statistics(tensor.detach(), histogram)
            found[site] = found[site].merged(seen) if site in found else seen

    layers = find_layers(model, [site.path for site in sites], "reduce")
    known = {(id(entry.owner), entry.attribute): entry for entry in every_name(model).values()}
    for site in dict.fromkeys(sites):
        if site.side == "weight":
            entry = known.get((id(layers[site.path]), "weight"))
            if entry is None:
                raise ModelError(f"reduce '{site}': layer '{site.path}' has no weight")
            look(site, paddle.transpose(entry.tensor, [1, 0]) if entry.transposed else entry.tensor)
    called = [site for site in dict.fromkeys(sites) if site.side != "weight"]
    if called:
        with watched(layers, called, look), mode(model, train=False), paddle.no_grad():
            run(model, inputs, ())
    return {
        site: Statistics(seen.low, seen.high, seen.absmax / seen.samples, seen.histogram)
        for site in sites
        if (seen := found.get(site)) is not None
    }


@contextmanager
def watched(layers: Mapping[str, Any], sites: Sequence[Site], look: Callable[[Site, Tensor], None]) -> Iterator[None]:
    """Show `look` the tensors of the sites as layers are called."""
    handles, taps = [], []
    for path, layer in layers.items():
        watch = _Watch([site for site in sites if site.path == path], look)
        handles.append(layer.register_forward_pre_hook(watch.enter, prepend=True, with_kwargs=True))
        forward = wrapped(layer)
        if forward is None:
            handles.append(layer.register_forward_post_hook(watch.after, prepend=True))
        else:
            forward.taps.append(watch.leave)
            taps.append(forward)
    try:
        with hooked(handles):
            yield
    finally:
        for forward in taps:
            forward.taps.clear()


class _Watch:
    """Hooks of one layer; `look` is shown the tensors of its sites."""

    def __init__(self, sites: list[Site], look: Callable[[Site, Tensor], None]) -> None:
        self.sites, self.look, self.calls = sites, look, 0

    def enter(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer's forward."""
        self.calls += 1
        self._show("input", (args, kwargs))

    def after(self, layer: Any, args: Any, output: Any) -> None:
        """After it."""
        self.leave(output)

    def leave(self, output: Any) -> None:
        """What it gave."""
        self._show("output", output)

    def _show(self, side: str, value: Any) -> None:
        chosen = [site for site in self.sites if site.side == side and site.call in (None, self.calls - 1)]
        tensors = list(_tensors(value)) if chosen else []
        for site in chosen:
            if site.argument < len(tensors):
                self.look(site, tensors[site.argument])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, paddle.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def statistics(x: Tensor, histogram: bool) -> Seen:
    """Of one tensor that is not empty; computed where it is, in its own type."""
    x = contiguous(x if x.dtype in (paddle.float32, paddle.float64) else x.astype("float64"))
    rows = [int(x.shape[0]), -1] if len(x.shape) else [1, 1]
    if on_cpu(x):
        lows, highs = extremes(view(x).reshape(1, *rows))
    else:
        flat = x.reshape(rows)
        lows, highs = paddle.amin(flat, axis=1).numpy(), paddle.amax(flat, axis=1).numpy()
    low, high = float(lows.min()), float(highs.max())
    absmax = float(np.maximum(-lows.astype(np.float64), highs).sum())
    made = None
    if histogram and math.isfinite(low) and math.isfinite(high):
        exponent = exponent_of(max(-low, high))
        made = Histogram(exponent, _counts(view(x).reshape(-1), exponent) if on_cpu(x) else _device_counts(x, exponent))
    return Seen(low, high, absmax, len(lows), made)


def exponent_of(absmax: float) -> int:
    """The smallest whole number e >= -126 with absmax <= 2**e."""
    mantissa, exponent = math.frexp(absmax)
    return max(-126, exponent - 1 if mantissa == 0.5 else exponent) if absmax else -126


def _wide(exponent: int) -> bool:
    """Would float32 overflow or underflow in a product with the width of the bins?"""
    return abs(exponent) > 100


def _counts(flat: Array, exponent: int) -> Array:
    """How many entries each bin has; products with a power of two are exact."""
    dtype = np.float64 if _wide(exponent) else flat.dtype
    scale = np.asarray(math.ldexp(_HALF, -exponent), dtype)
    counts = np.zeros(HISTOGRAM_BINS + 1, np.int64)
    scaled, places = np.empty(min(BLOCK, flat.size), dtype), np.empty(min(BLOCK, flat.size), np.intp)
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        values, index = scaled[: part.size], places[: part.size]
        np.multiply(part, scale, out=values, dtype=dtype)
        np.floor(values, out=values)
        values += _HALF
        np.copyto(index, values, casting="unsafe")
        counts += np.bincount(index, minlength=HISTOGRAM_BINS + 1)
    counts[-2] += counts[-1]  # an entry of exactly 2**exponent
    return counts[:-1]


def _device_counts(x: Tensor, exponent: int) -> Array:
    """The same in Paddle's operations."""
    scaled = paddle.floor(x.astype("float64") * math.ldexp(_HALF, -exponent)).astype("int64") + _HALF
    places = paddle.clip(scaled, 0, HISTOGRAM_BINS - 1).reshape([-1])
    counts: Array = paddle.bincount(places, minlength=HISTOGRAM_BINS).numpy().astype(np.int64)
    return counts


def merged(one: Histogram, other: Histogram) -> Histogram:
    """Two histograms in one of the wider range."""
    exponent = max(one.exponent, other.exponent)
    return Histogram(exponent, _widened(one, exponent) + _widened(other, exponent))


def _widened(histogram: Histogram, exponent: int) -> Array:
    """Neighbouring bins added, for a range of 2**exponent."""
    steps = min(exponent - histogram.exponent, HISTOGRAM_BINS.bit_length())
    counts = np.zeros(HISTOGRAM_BINS, np.int64)
    np.add.at(counts, (np.arange(-_HALF, _HALF) >> steps) + _HALF, histogram.counts)
    return counts
