"""Fake quantizations whose grid is fixed, or made for each tensor; and one that only looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from slimbridge.decisions import DynamicGrid, QuantParams
from slimbridge.errors import ModelError
from slimbridge.ports import Array, Ops, Tensor
from slimbridge.quantize.formulas import Constants, asymmetric, grouped, magnitude, symmetric


@dataclass(eq=False)
class Plain:
    """What every fake quantization has; nothing unless a subclass fills it.

    Attributes:
        parameters, buffers, reads: see `slimbridge.ports.FakeQuant`.
    """

    parameters: Mapping[str, Array] = field(init=False, default_factory=dict)
    buffers: Mapping[str, Array] = field(init=False, default_factory=dict)
    reads: Mapping[str, str] = field(init=False, default_factory=dict)
    _constants: Constants = field(init=False, repr=False, default_factory=Constants)


@dataclass(eq=False)
class Static(Plain):
    """A tensor on a grid that was decided before.

    Attributes:
        grid: the grid.
        where: what messages start with, the site's name.

    Raises:
        ModelError: the grid is not usable.
    """

    grid: QuantParams
    where: str = "a tensor"

    def __post_init__(self) -> None:
        check_grid(self.grid, self.where)
        self._step = _shaped(self.grid.step, self.grid)
        zeros = self.grid.zero_point
        self._zero_point = _shaped(zeros * (len(self.grid.step) // len(zeros)), self.grid) if any(zeros) else None

    @classmethod
    def of(cls, grid: QuantParams, where: str) -> Static:
        """On the grid of the tensor that is called `where`."""
        return cls(grid, where)

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor on its grid; ModelError when it has another number of channels or groups."""
        grid = self.grid
        flat = x if grid.group is None else grouped(ops, x, grid.group, self.where)
        if grid.axis is not None:
            self._check_channels(ops.shape(flat), 0 if grid.group else grid.axis)
        step = self._constants(ops, self._step, x)
        zero_point = None if self._zero_point is None else self._constants(ops, self._zero_point, x)
        axis = 0 if grid.group else grid.axis
        on_grid = ops.fake_quant(flat, step, zero_point, grid.low, grid.high, axis, grid.rounding == "away")
        return (on_grid if grid.group is None else ops.reshape(on_grid, ops.shape(x))), {}

    def _check_channels(self, shape: tuple[int, ...], axis: int) -> None:
        steps = len(self.grid.step)
        if axis >= len(shape) or shape[axis] != steps:
            what = "groups" if self.grid.group else "channels"
            found = shape[axis] if axis < len(shape) else 0
            raise ModelError(f"{self.where}: {steps} steps for {found} {what}")


def check_grid(grid: QuantParams, where: str) -> None:
    """Raise ModelError, starting with `where`, unless the grid can be used."""
    with np.errstate(over="ignore"):
        steps = np.asarray(grid.step, np.float32)
    bad = [step for step, used in zip(grid.step, steps, strict=True) if not (np.isfinite(used) and used > 0)]
    if bad:
        raise ModelError(f"{where}: each step must be positive and finite in float32, found {bad[0]}")
    if grid.low >= grid.high:
        raise ModelError(f"{where}: integers {grid.low}..{grid.high}; the first must be below the second")
    if len(steps) == 0 or (grid.axis is None and len(steps) != 1):
        raise ModelError(f"{where}: {len(steps)} steps without an axis; one is allowed")
    if len(grid.zero_point) not in (1, len(steps)):
        raise ModelError(f"{where}: {len(grid.zero_point)} zero points for {len(steps)} steps")
    for zero_point in grid.zero_point:
        if not grid.low <= zero_point <= grid.high:
            raise ModelError(f"{where}: zero_point {zero_point} is outside {grid.low}..{grid.high}")
    if grid.group is not None and (grid.group < 1 or grid.axis != 0):
        raise ModelError(f"{where}: groups must have 1 entry at least, along axis 0; found {grid.group}, {grid.axis}")


def _shaped(numbers: tuple[float, ...], grid: QuantParams) -> Array:
    """Shape () for a grid per tensor, else (steps,); float32's values, whatever the dtype later."""
    return np.asarray(numbers, np.float32).reshape(() if grid.axis is None else -1)


@dataclass(eq=False)
class Dynamic(Plain):
    """A tensor on a grid made from its own values at each call, the extremes found on the device.

    Asymmetric as ONNX's DynamicQuantizeLinear has it, for any integers; symmetric: step = largest magnitude / high.

    Attributes:
        grid: the integers.
        where: what messages start with, the site's name.

    Raises:
        ModelError: the integers are not usable.
    """

    grid: DynamicGrid
    where: str = "a tensor"

    def __post_init__(self) -> None:
        low, high = self.grid.low, self.grid.high
        if low >= high or (self.grid.symmetric and not low <= 0 < high):
            need = "around 0" if self.grid.symmetric else "the first below the second"
            raise ModelError(f"{self.where}: integers {low}..{high}; they must be {need}")

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor on its grid; the step gets no gradient."""
        low, high = self.grid.low, self.grid.high
        smallest, largest = ops.extremes(x)
        zero_point = None
        if self.grid.symmetric:
            step = symmetric(ops, self._constants, magnitude(ops, smallest, largest), high)
        else:
            step, zero_point = asymmetric(ops, self._constants, smallest, largest, low, high)
        return ops.fake_quant(x, step, zero_point, low, high), {}


@dataclass(eq=False)
class Recorder(Plain):
    """No quantization: keeps a tensor that passes, and lets it pass.

    A backend keeps the object that it was given, so that its `value` can be read where it was made; only the models
    that it clones carry copies.

    Attributes:
        value: the tensor of the last call, as an array; None before.
    """

    value: Array | None = None

    def __call__(
        self, ops: Ops, x: Tensor, state: Mapping[str, Tensor], training: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The tensor itself."""
        self.value = ops.numpy(x)
        return x, {}
