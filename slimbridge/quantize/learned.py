"""Fake quantizations with learned ranges: LSQ, LSQ+, PACT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from slimbridge.decisions import QuantParams
from slimbridge.errors import ModelError
from slimbridge.ports import Array, Ops, Tensor, as_float64
from slimbridge.quantize.fake import Plain, check_grid
from slimbridge.quantize.formulas import (
    HOST,
    TINY,
    Arithmetic,
    asymmetric,
    grouped,
    params,
    positive,
    symmetric,
    symmetric_limit,
)


def lsq_step(mean_magnitude: Array, largest: int) -> Array:
    """LSQ's initial step, 2 * mean(abs(x)) / sqrt(largest integer), float32; 1 where that is 0.

    Source: Esser et al. 2020, "Learned step size quantization", section 2.1. Meant for 2 to 4 bits: at 8 bits it is
    several times the step that holds the whole tensor without clipping, which then is the better start.

    Args:
        mean_magnitude: of the tensor or of each channel.
        largest: the largest integer.
    """
    step = (2 * as_float64(mean_magnitude) / sqrt(largest)).astype(np.float32)
    return np.where(step > 0, step, np.float32(1))


def scaled_gradient(ops: Ops, value: Tensor, scale: Tensor) -> Tensor:
    """The value, exactly; its gradient times `scale`."""
    product = value * scale
    return ops.stop_gradient(value) + (product - ops.stop_gradient(product))


@dataclass(eq=False)
class LSQ(Plain):
    """A tensor whose step is learned.

    The gradient of the step is `Ops.fake_quant`'s, times 1 / sqrt(N * Qp): N entries share the step, of an
    activation those of one sample (the paper's number of features: its loss is a mean over the batch); Qp is the
    largest integer above the zero point. The parameter counts by its magnitude, see `formulas.positive`.

    Source: Esser et al. 2020, "Learned step size quantization", equations 1 to 3 and section 2.2. There an entry
    counts as clipped from the last integer on, here from half a step beyond it, where rounding takes it.

    Attributes:
        initial: step, real units per integer, shape () or (steps,).
        low, high: smallest and largest integer.
        axis, group: see `QuantParams`.
        zero_point: one, or as many as steps; it stays.
        activation: is the first axis that of the samples?
        away: halves are rounded away from zero.
        where: what messages start with, the site's name.
        frozen: the step gets no gradient.

    Raises:
        ModelError: the grid is not usable.
    """

    initial: Array
    low: int
    high: int
    axis: int | None = None
    group: int | None = None
    zero_point: tuple[int, ...] = (0,)
    activation: bool = True
    away: bool = False
    where: str = "a tensor"
    frozen: bool = False

    def __post_init__(self) -> None:
        step = np.array(self.initial, np.float32).reshape(() if self.axis is None else -1)
        self.parameters = {"step": step}
        check_grid(self._params(step), self.where)
        zeros = self.zero_point * (step.size // len(self.zero_point))
        self._zeros = np.asarray(zeros, np.float32).reshape(step.shape) if any(zeros) else None

    @classmethod
    def of(cls, grid: QuantParams, where: str, activation: bool = True) -> LSQ:
        """Starts at the step of a grid."""
        return cls(
            initial=np.asarray(grid.step, np.float32),
            low=grid.low,
            high=grid.high,
            axis=grid.axis,
            group=grid.group,
            zero_point=grid.zero_point,
            activation=activation,
            away=grid.rounding == "away",
            where=where,
        )

    @classmethod
    def of_weight(cls, weight: Array, where: str, bits: int = 8, axis: int | None = 0) -> LSQ:
        """Starts at the paper's step of a weight (its BatchNorm folded in) for each index of `axis`; symmetric."""
        limit = symmetric_limit(bits)
        others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
        step = lsq_step(np.abs(as_float64(weight)).mean(axis=others), limit)
        return cls(step, -limit, limit, axis, activation=False, where=where)

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor on its grid; ModelError when it has another number of channels or groups."""
        flat = x if self.group is None else grouped(ops, x, self.group, self.where)
        step = state["step"]
        step = positive(ops, self._constants, ops.stop_gradient(step) if self.frozen else step)
        scale = gradient_scale(self._sharing(ops.shape(flat)), self.high - min(self.zero_point))
        step = scaled_gradient(ops, step, self._constants(ops, scale, step))
        zeros = None if self._zeros is None else self._constants(ops, self._zeros, x)
        on_grid = ops.fake_quant(flat, step, zeros, self.low, self.high, self.axis, self.away)
        return (on_grid if self.group is None else ops.reshape(on_grid, ops.shape(x))), {}

    def grid(self, values: Mapping[str, Array]) -> QuantParams:
        """The grid of the learned step."""
        return self._params(positive(HOST, self._constants, np.asarray(values["step"])))

    def _params(self, step: Array) -> QuantParams:
        zeros = np.asarray(self.zero_point)
        return params(step, zeros, (self.low, self.high), self.axis, self.group, self.away)

    def _sharing(self, shape: tuple[int, ...]) -> int:
        """Entries that share a step, of one sample."""
        steps = self.parameters["step"].size
        if self.axis is not None and (self.axis >= len(shape) or shape[self.axis] != steps):
            raise ModelError(f"{self.where}: {steps} steps for a tensor of shape {shape} along axis {self.axis}")
        samples = shape[0] if self.activation and shape and self.axis != 0 else 1
        return int(np.prod(shape, dtype=np.int64)) // max(steps * samples, 1)


def gradient_scale(entries: int, largest: int) -> float:
    """1 / sqrt(N * Qp), Esser et al. 2020, section 2.2; both count as 1 at least."""
    return 1 / sqrt(max(entries, 1) * max(largest, 1))


@dataclass(eq=False)
class LSQPlus(Plain):
    """An activation whose step and offset are learned: round(clip((x - offset) / step, low, high)) * step + offset.

    The gradient of the offset is 1 where an entry is clipped, else 0; that of the step is LSQ's for x - offset.
    Both are scaled as LSQ scales them.

    Source: Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through learnable offsets and better
    initialization", section 3.1; clipped as `LSQ` has it.

    Attributes:
        step: initial step, real units per integer.
        offset: initial offset, real units.
        low, high: smallest and largest integer.
        away: halves are rounded away from zero.
        where: what messages start with, the site's name.
        frozen: step and offset get no gradient.

    Raises:
        ModelError: the grid is not usable.
    """

    step: float
    offset: float
    low: int = 0
    high: int = 255
    away: bool = False
    where: str = "a tensor"
    frozen: bool = False

    def __post_init__(self) -> None:
        check_grid(params(np.asarray(self.step), np.asarray(self.low), (self.low, self.high)), self.where)
        if not np.isfinite(np.float32(self.offset)):
            raise ModelError(f"{self.where}: the offset must be finite, found {self.offset}")
        self.parameters = {"step": np.asarray(self.step, np.float32), "offset": np.asarray(self.offset, np.float32)}

    @classmethod
    def of_range(cls, smallest: float, largest: float, low: int, high: int, where: str) -> LSQPlus:
        """Starts with low at the smallest and high at the largest value; with a step of 1 where the two are equal."""
        step = (largest - smallest) / (high - low)
        step = step if step > TINY else 1.0
        return cls(step, smallest - low * step, low, high, where=where)

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor on its grid."""
        step, offset = state["step"], state["offset"]
        if self.frozen:
            step, offset = ops.stop_gradient(step), ops.stop_gradient(offset)
        entries = int(np.prod(ops.shape(x)[1:], dtype=np.int64))
        scale = self._constants(ops, gradient_scale(entries, self.high), step)
        step = scaled_gradient(ops, positive(ops, self._constants, step), scale)
        offset = scaled_gradient(ops, offset, scale)
        return ops.fake_quant(x - offset, step, None, self.low, self.high, away=self.away) + offset, {}

    def grid(self, values: Mapping[str, Array]) -> QuantParams:
        """The grid of integers with the nearest zero point: the offset becomes a whole number of steps.

        Values differ from the trained ones by half a step at most, and 0 is on the grid, as zero padding needs it. A
        range that leaves 0 out is widened to it, so that its step grows.
        """
        step = positive(HOST, self._constants, np.asarray(values["step"]))
        offset = np.asarray(values["offset"])
        zero_point = np.rint(-offset / step)
        if not self.low <= zero_point <= self.high:
            low, high = (step * np.asarray(end, step.dtype) + offset for end in (self.low, self.high))
            step, zero_point = asymmetric(HOST, self._constants, low, high, self.low, self.high)
        return params(step, zero_point, (self.low, self.high), away=self.away)


@dataclass(eq=False)
class PACT(Plain):
    """An activation whose clipping threshold is learned: clip(x, 0, alpha), step = alpha / (2**bits - 1).

    The gradient of alpha is 1 where x >= alpha, else 0; that of x is 1 between the limits, else 0. For tensors with
    negative values (no part of the paper): clip(x, -alpha, alpha), step = alpha / (2**(bits-1) - 1), and -1 where
    x <= -alpha. The paper keeps alpha small by weight decay, as that of the weights. Alpha counts by its magnitude,
    see `formulas.positive`.

    Source: Choi et al. 2018, "PACT: Parameterized clipping activation for quantized neural networks", equations 1
    to 3.

    Attributes:
        alpha: initial threshold, real units.
        bits: word length, 2..8.
        signed: are there negative values?
        away: halves are rounded away from zero.
        where: what messages start with, the site's name.
        frozen: alpha gets no gradient.

    Raises:
        ModelError: a number is not usable.
    """

    alpha: float
    bits: int = 8
    signed: bool = False
    away: bool = False
    where: str = "a tensor"
    frozen: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ModelError(f"{self.where}: bits must be 2..8, found {self.bits}")
        if not (np.isfinite(np.float32(self.alpha)) and self.alpha > 0):
            raise ModelError(f"{self.where}: alpha must be positive and finite, found {self.alpha}")
        self.high = symmetric_limit(self.bits) if self.signed else 2**self.bits - 1
        self.low = -self.high if self.signed else 0
        self.parameters = {"alpha": np.asarray(self.alpha, np.float32)}

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor on its grid."""
        alpha = state["alpha"]
        alpha = positive(ops, self._constants, ops.stop_gradient(alpha) if self.frozen else alpha)
        bottom = -alpha if self.signed else self._constants(ops, 0.0, x)
        # Comparisons that NaN fails, so that it stays what it is.
        clipped = ops.where(x >= alpha, alpha, ops.where(x <= bottom, bottom, x))
        step = self._step(ops, ops.stop_gradient(alpha))
        return ops.fake_quant(clipped, step, None, self.low, self.high, away=self.away), {}

    def grid(self, values: Mapping[str, Array]) -> QuantParams:
        """The grid of the learned threshold."""
        alpha = positive(HOST, self._constants, np.asarray(values["alpha"]))
        return params(self._step(HOST, alpha), None, (self.low, self.high), away=self.away)

    def _step(self, ops: Arithmetic, alpha: Tensor) -> Tensor:
        return symmetric(ops, self._constants, alpha, self.high)
