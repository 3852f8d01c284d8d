"""Fake quantizations for training whose ranges follow the tensors, without parameters of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slimbridge.decisions import Fold, QuantParams
from slimbridge.errors import ModelError
from slimbridge.ports import Array, FakeQuant, Ops, Tensor
from slimbridge.quantize.fake import Plain
from slimbridge.quantize.formulas import (
    HOST,
    NORMAL,
    Arithmetic,
    asymmetric,
    grouped,
    magnitude,
    params,
    symmetric,
    symmetric_limit,
)


class Trainable(FakeQuant, Protocol):
    """A fake quantization that is trained with the model.

    A backend keeps the object that it was given, so that `frozen` can be set from outside.

    Attributes:
        frozen: ranges do not move any more, and learned ones get no gradient.
    """

    frozen: bool

    def grid(self, values: Mapping[str, Array]) -> QuantParams:
        """The grid that it now computes with.

        Args:
            values: name -> array, of `parameters` and `buffers` as the model holds them; of a fake quantization
                that has none the tensor itself, "weight", with its BatchNorm folded in.
        """


@dataclass(eq=False)
class MovingAverage(Plain):
    """An activation whose range is the moving average of the batches' own: r <- rate * r + (1 - rate) * new.

    The average starts at the calibrated range, else at the first batch's (as torch.ao.quantization's
    MovingAverageMinMaxObserver in PyTorch 2.13 does); before that the tensor's own range counts. Only training steps
    move it; each batch is quantized by the range that it has moved already.

    Attributes:
        low, high: smallest and largest integer; they stay what calibration decided, signed or unsigned.
        symmetric: the average is one of largest magnitudes, buffer "threshold", and step = threshold / high; else of
            the smallest and largest values, buffers "min" and "max", as `formulas.asymmetric` has it.
        rate: share of the old value kept, 0 to below 1.
        initial: calibrated smallest and largest value, real units.
        away: halves are rounded away from zero.
        where: what messages start with, the site's name.
        frozen: the range does not move.

    Raises:
        ModelError: a number is not usable.
    """

    low: int
    high: int
    symmetric: bool
    rate: float = 0.9
    initial: tuple[float, float] | None = None
    away: bool = False
    where: str = "a tensor"
    frozen: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ModelError(f"{self.where}: rate must be 0 to below 1, found {self.rate}")
        if self.low >= self.high or (self.symmetric and not self.low <= 0 < self.high):
            raise ModelError(f"{self.where}: integers {self.low}..{self.high} hold no grid")
        smallest, largest = self.initial or (0.0, 0.0)
        if not (np.isfinite([smallest, largest]).all() and smallest <= largest):
            raise ModelError(f"{self.where}: the calibrated range is {smallest}..{largest}")
        start = {"threshold": max(-smallest, largest)} if self.symmetric else {"min": smallest, "max": largest}
        start["count"] = float(self.initial is not None)
        self.buffers = {name: np.asarray(value, np.float32) for name, value in start.items()}

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor on its grid, and the buffers after the batch in a training step."""
        moves = training and not self.frozen
        changed = self._moved(ops, x, state) if moves or self.initial is None else {}
        if not moves:
            changed = {name: ops.where(state["count"] > 0, state[name], new) for name, new in changed.items()}
        step, zero_point = self._step(ops, {**state, **changed})
        return ops.fake_quant(x, step, zero_point, self.low, self.high, away=self.away), changed if moves else {}

    def grid(self, values: Mapping[str, Array]) -> QuantParams:
        """The grid of the range; ModelError before the first batch where nothing was calibrated."""
        if not values["count"] > 0:
            raise ModelError(f"{self.where}: neither calibration nor a training step has given it a range")
        step, zero_point = self._step(HOST, values)
        return params(step, zero_point, (self.low, self.high), away=self.away)

    def _moved(self, ops: Ops, x: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        smallest, largest = ops.extremes(x)
        if self.symmetric:
            new = {"threshold": magnitude(ops, smallest, largest)}
        else:
            new = {"min": smallest, "max": largest}
        seen = state["count"]
        kept, added = (self._constants(ops, share, seen) for share in (self.rate, 1 - self.rate))
        moved = {name: ops.where(seen > 0, kept * state[name] + added * value, value) for name, value in new.items()}
        return {**moved, "count": seen + self._constants(ops, 1.0, seen)}

    def _step(self, ops: Arithmetic, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:
            return symmetric(ops, self._constants, values["threshold"], self.high), None
        return asymmetric(ops, self._constants, values["min"], values["max"], self.low, self.high)


@dataclass(eq=False)
class AbsMax(Plain):
    """A weight whose step is its largest magnitude / (2**(bits-1) - 1) at each call: nothing is clipped.

    The step gets no gradient, the weight its own (straight-through). It has no range to freeze: `frozen` changes
    nothing.

    Attributes:
        bits: word length, 2..8.
        axis: of the channels that have steps of their own; None for one step.
        group: entries of one row of axis 0 that share a step; `axis` is then 0.
        away: halves are rounded away from zero.
        where: what messages start with.
        frozen: of no effect.
    """

    bits: int = 8
    axis: int | None = 0
    group: int | None = None
    away: bool = False
    where: str = "a weight"
    frozen: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ModelError(f"{self.where}: bits must be 2..8, found {self.bits}")
        if self.group is not None and (self.group < 1 or self.axis != 0):
            raise ModelError(f"{self.where}: groups must have 1 entry at least, along axis 0; found {self.group}")

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The weight on its grid."""
        limit = symmetric_limit(self.bits)
        flat = x if self.group is None else grouped(ops, x, self.group, self.where)
        threshold = magnitude(ops, *ops.extremes(flat, self.axis))
        step = symmetric(ops, self._constants, threshold, limit)
        on_grid = ops.fake_quant(flat, step, None, -limit, limit, self.axis, self.away)
        return (on_grid if self.group is None else ops.reshape(on_grid, ops.shape(x))), {}

    def grid(self, values: Mapping[str, Array]) -> QuantParams:
        """The grid of `values["weight"]`, the weight with its BatchNorm folded in."""
        weight, limit = values["weight"], symmetric_limit(self.bits)
        rows = weight.reshape(1, -1) if self.axis is None else np.moveaxis(weight, self.axis, 0)
        threshold = np.abs(rows.reshape(-1, self.group) if self.group else rows.reshape(len(rows), -1)).max(axis=1)
        step = symmetric(HOST, self._constants, threshold, limit)
        return params(step, None, (-limit, limit), self.axis, self.group, self.away)


@dataclass(eq=False)
class Folded(Plain):
    """A weight that is quantized as it will be once the BatchNorm after it is folded in.

    factor = scale / sqrt(variance + eps) for each output channel; what comes is quantize(weight * factor) / factor,
    so that the BatchNorm still does its work. The factor is made of the running variance and gets no gradient. A
    channel whose factor is 0, or too small for float32, is quantized as it is.

    Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.2, and
    torch.ao.nn.intrinsic.qat.ConvBn2d (PyTorch 2.13), which lets the gradient of the scale through.

    Attributes:
        inner: of the weight with the factor in it.
        fold: the BatchNorm.

    Raises:
        ModelError: the inner one uses the names "scale" or "variance".
    """

    inner: Trainable
    fold: Fold

    def __post_init__(self) -> None:
        clash = {"scale", "variance"} & {*self.inner.parameters, *self.inner.buffers, *self.inner.reads}
        if clash:
            raise ModelError(f"'{self.fold.weight}': a folded fake quantization must not use the names {sorted(clash)}")
        self.parameters, self.buffers = self.inner.parameters, self.inner.buffers
        self.reads = {**self.inner.reads, "scale": self.fold.scale, "variance": self.fold.variance}

    @property
    def frozen(self) -> bool:
        """That of the inner one."""
        return self.inner.frozen

    @frozen.setter
    def frozen(self, value: bool) -> None:
        self.inner.frozen = value

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The weight, shape (out, ...), without the factor."""
        scale, variance = (ops.stop_gradient(state[name]) for name in ("scale", "variance"))
        factor = ops.divide(scale, ops.sqrt(variance + self._constants(ops, self.fold.eps, variance)))
        too_small = ops.abs(factor) < self._constants(ops, NORMAL, factor)
        factor = ops.where(too_small, self._constants(ops, 1.0, factor), factor)
        shape = ops.shape(x)
        factor = ops.reshape(factor, (shape[0], *[1] * (len(shape) - 1)))
        on_grid, changed = self.inner(ops, x * factor, state, training)
        return on_grid / factor, changed

    def grid(self, values: Mapping[str, Array]) -> QuantParams:
        """The inner one's, of the weight with its BatchNorm folded in."""
        return self.inner.grid(values)
