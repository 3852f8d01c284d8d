"""Integer weights and biases in an ONNX graph, read through DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import QuantParams
from slimbridge.deploy.onnx_cells import Cell
from slimbridge.deploy.onnx_match import Weight
from slimbridge.deploy.onnx_net import Net, Node, attributes, node, require
from slimbridge.errors import ModelError
from slimbridge.ports import Array
from slimbridge.quantize.grid import to_integers

BLOCKS_SINCE = 21
"""Opset in which DequantizeLinear takes several steps along one axis, and 4-bit integers."""


@dataclass(frozen=True)
class Stored:
    """An integer weight as it stands in the file.

    Attributes:
        integers: int8, in the initialiser's layout.
        step: float32, shape (), (channels,) or, per group, as the integers with one entry for each group.
        zero: int8, of the same shape.
        axis: of the integers that the steps go along; None for one step.
        group: entries along `axis` that share a step.
        bits: 4 or 8, of the type it is stored in.
    """

    integers: NDArray[np.int8]
    step: NDArray[np.float32]
    zero: NDArray[np.int8]
    axis: int | None
    group: int | None
    bits: int


def stored(name: str, values: Array, grid: QuantParams, place: Weight, packed: bool) -> Stored:
    """The integers of a weight, signed whatever its grid is.

    Args:
        name: canonical name, for messages.
        values: canonical layout, on the grid.
        grid: at most 8 bits.
        place: where and how the file holds it.
        packed: are grids of at most 4 bits stored in 4?

    Raises:
        ModelError: the grid has more than 8 bits.
    """
    if grid.high - grid.low > 255:
        raise ModelError(f"{name}: an ONNX file holds at most 8 bits, found {grid.low}..{grid.high}")
    bits = 4 if packed and grid.high - grid.low < 16 else 8
    half = 1 << (bits - 1)
    shift = half + grid.low if not -half <= grid.low <= grid.high < half else 0
    integers = (to_integers(values, grid).astype(np.int16) - shift).astype(np.int8)
    step = np.asarray(grid.step, np.float32)
    zero = np.broadcast_to(np.asarray(grid.zero_point, np.int16) - shift, step.shape).astype(np.int8)
    if grid.group is not None:
        rows = values.shape[0]
        step, zero = step.reshape(rows, -1), zero.reshape(rows, -1)
        integers = integers.reshape(rows, -1)
        if place.transposed:
            return Stored(integers.T.copy(), step.T.copy(), zero.T.copy(), 0, grid.group, bits)
        return Stored(integers, step, zero, 1, grid.group, bits)
    axis = None if step.size == 1 else grid.axis
    if axis is None:
        step, zero = step.reshape(()), zero.reshape(())
    if place.transposed:
        return Stored(integers.T.copy(), step, zero, None if axis is None else 1 - axis, None, bits)
    return Stored(integers, step, zero, axis, None, bits)


def write_weight(net: Net, initialiser: str, weight: Stored) -> str:
    """Put an integer weight and its DequantizeLinear in front of the graph; the name of the real weight."""
    shape = net.constants[initialiser].shape
    names = [f"{initialiser}/integers", f"{initialiser}/step", f"{initialiser}/zero"]
    net.constants[names[1]] = weight.step
    for name, array in ((names[0], weight.integers), (names[2], weight.zero)):
        if weight.bits == 4:
            onnx = require("onnx")
            entries = array.ravel().tolist()
            net.stored[name] = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, array.shape, entries)
        else:
            net.constants[name] = array
    options: dict[str, Any] = {} if weight.axis is None else {"axis": weight.axis}
    if weight.group is not None:
        options["block_size"] = weight.group
    real = f"{initialiser}/real"
    made = [node("DequantizeLinear", names, real, **options)]
    if weight.integers.shape != shape:
        net.constants[f"{initialiser}/shape"] = np.asarray(shape, np.int64)
        made = [node("DequantizeLinear", names, f"{initialiser}/rows", **options)]
        made.append(node("Reshape", [f"{initialiser}/rows", f"{initialiser}/shape"], real))
    net.nodes[:0] = made
    return real


def write_bias(net: Net, item: Node, weight: Stored, cell: Cell) -> str | None:
    """Give a linear node whose input is on a grid an int32 bias of step (input step * weight step).

    Returns:
        Why the bias stays in float, None when it does not (or there is none).
    """
    if len(item.input) < 3 or not item.input[2]:
        return None
    bias = net.constants.get(item.input[2])
    options = attributes(item)
    if bias is None or bias.ndim != 1 or options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0:
        return "its bias is computed or scaled"
    if weight.group is not None or weight.zero.any():
        return "its weight has steps for groups, or zero points"
    step = np.broadcast_to(np.float32(cell.step) * weight.step, bias.shape).astype(np.float32)
    integers = np.rint(bias.astype(np.float64) / step)
    if not (np.abs(integers) < 2**31).all():
        return "its bias is too large for 32 bits on this step"
    name = f"{item.output[0]}/bias"
    made = {f"{name}/integers": integers.astype(np.int32), f"{name}/step": step}
    made[f"{name}/zero"] = np.zeros(bias.shape, np.int32)
    net.constants |= made
    net.nodes.insert(0, node("DequantizeLinear", list(made), f"{name}/real", axis=0))
    item.input[2] = f"{name}/real"
    return None
