"""Grids of activations in an ONNX graph: unsigned 8-bit integers between QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from slimbridge.decisions import QuantParams
from slimbridge.deploy.onnx_match import ACTIVATIONS
from slimbridge.deploy.onnx_net import Net, Node, attributes, node
from slimbridge.errors import ModelError

LARGEST = 255
MOVES = (
    *("MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Expand", "Tile"),
    *("Gather", "DepthToSpace", "SpaceToDepth", "Resize", "Identity"),
)
"""Operators whose outputs hold entries of their first input and nothing else (but zeros): rounding before or after them
gives the same."""


@dataclass(frozen=True)
class Cell:
    """A grid in unsigned 8-bit integers: real = step * (integer - zero).

    Attributes:
        step: float32.
        zero: 0..255.
        low, high: smallest and largest integer used, 0..255.
    """

    step: float
    zero: int
    low: int = 0
    high: int = LARGEST

    @classmethod
    def of(cls, key: str, grid: QuantParams) -> Cell:
        """The grid moved so that its lowest integer is 0, which changes no value.

        Raises:
            ModelError: it has several steps, or more than 8 bits.
        """
        if len(grid.step) != 1 or grid.high - grid.low > LARGEST:
            raise ModelError(
                f"{key}: activations of an ONNX file have one step and at most 8 bits; "
                f"found {len(grid.step)} steps over {grid.low}..{grid.high}"
            )
        return cls(float(np.float32(grid.step[0])), grid.zero_point[0], grid.low, grid.high).moved()

    def moved(self) -> Cell:
        """The same values with integers that start at 0 (at the zero point, where that is lower)."""
        shift = min(self.low, self.zero)
        return Cell(self.step, self.zero - shift, self.low - shift, self.high - shift)

    def holds(self, other: Cell) -> bool:
        """Are the values of the other grid all on this one?"""
        lowest, highest = other.low - other.zero, other.high - other.zero
        return self.step == other.step and self.low - self.zero <= lowest and highest <= self.high - self.zero

    def clipped(self, smallest: float | None, largest: float | None) -> Cell:
        """The cell that gives round(clip(x)) for every x: rounding is monotonic, so clipping may come after it."""
        step = np.float32(self.step)
        low = self.low if smallest is None else max(self.low, int(np.rint(np.float32(smallest) / step)) + self.zero)
        high = self.high if largest is None else min(self.high, int(np.rint(np.float32(largest) / step)) + self.zero)
        return replace(self, low=min(low, high), high=high).moved()


@dataclass
class Cells:
    """Where the grids of a graph are.

    Attributes:
        net: the graph.
        tensors: tensor -> cell, for all who read it.
        reads: (id of a node, tensor) -> cell, for that node alone.
    """

    net: Net
    tensors: dict[str, Cell] = field(default_factory=dict)
    reads: dict[tuple[int, str], Cell] = field(default_factory=dict)

    def seen_by(self, item: Node, name: str) -> Cell | None:
        """The grid on which a node sees a tensor."""
        return self.reads.get((id(item), name), self.tensors.get(name))

    def join(self) -> None:
        """Where all readers of a tensor see it on one grid, it is the tensor's own."""
        for name, readers in self.net.readers().items():
            cells = [self.reads.get((id(item), name)) for item in readers]
            first = cells[0]
            shared = first is not None and all(cell == first for cell in cells)
            if first is not None and shared and name not in self.tensors and name not in self.net.outputs:
                self.tensors[name] = first
            for item, cell in zip(readers, cells, strict=True):
                if cell is not None and cell == self.tensors.get(name):
                    del self.reads[id(item), name]

    def spread(self) -> None:
        """Copy grids over data movement, forward, and backward where nobody else reads the tensor before it."""
        readers = self.net.readers()
        size = -1
        while size != len(self.tensors):
            size = len(self.tensors)
            for item in reversed(self.net.nodes):
                self._backward(item, readers)
            for item in self.net.nodes:
                self._forward(item)

    def _backward(self, item: Node, readers: Mapping[str, list[Node]]) -> None:
        cells = {self.tensors.get(name) for name in _entries(item)}
        cell = cells.pop()
        if cells or cell is None or not (moves(self.net, item) or item.op_type == "Concat"):
            return
        for name in item.input if item.op_type == "Concat" else item.input[:1]:
            if len(readers[name]) == 1 and name not in self.net.outputs and name not in self.net.constants:
                self.tensors.setdefault(name, cell)

    def _forward(self, item: Node) -> None:
        joined = item.op_type == "Concat"
        cells = {self.tensors.get(name) for name in (item.input if joined else item.input[:1])}
        if len(cells) != 1 or not (joined or moves(self.net, item)):
            return
        cell = cells.pop()
        for name in _entries(item):
            if cell is not None and name not in self.net.outputs:
                self.tensors.setdefault(name, cell)

    def absorb(self) -> None:
        """Activations that only clip become the bounds of the grid after them, as an integer layer clips anyway."""
        makers, readers = self.net.makers(), self.net.readers()
        for item in list(self.net.nodes):
            if item.op_type not in ACTIVATIONS:
                continue
            source, target = item.input[0], item.output[0]
            bounds = _bounds(self.net, item)
            free = len(readers[source]) == 1 and source not in (*self.net.outputs, *self.tensors)
            if bounds is None or target not in self.tensors or not free or source not in makers:
                continue
            self.tensors[target] = self.tensors[target].clipped(*bounds)
            maker = makers[source]
            maker.output[list(maker.output).index(source)] = target
            makers[target] = maker
            self.net.nodes.remove(item)

    def tighten(self) -> None:
        """Where moved entries are on a wider grid of the same step, the grid they came from serves as well."""
        for item in self.net.nodes:
            before = {self.tensors.get(name) for name in (item.input if item.op_type == "Concat" else item.input[:1])}
            first = before.pop() if before else None
            if first is None or before or not (item.op_type == "Concat" or moves(self.net, item)):
                continue
            for name in _entries(item):
                if name in self.tensors and self.tensors[name].holds(first):
                    self.tensors[name] = first

    def write(self) -> None:
        """Put the nodes in: QuantizeLinear, Clip where the grid is narrower than 8 bits, DequantizeLinear."""
        old, self.net.nodes = self.net.nodes, []
        bounded = {name for item in old for name in _entries(item) if self._is_bounded(item, name)}
        for name in self.net.inputs:
            self._write_pairs(name)
        for item in old:
            for place, name in enumerate(item.input):
                if (id(item), name) in self.reads:
                    item.input[place] = _own_name(name, self.reads[id(item), name])
                elif name in self.tensors:
                    item.input[place] = f"{name}/real"
            self.net.nodes.append(item)
            for name in item.output:
                self._write_pairs(name, name in bounded)

    def _is_bounded(self, item: Node, name: str) -> bool:
        """Is it made of entries that are on its grid already?"""
        sources = item.input if item.op_type == "Concat" else item.input[:1]
        moved = item.op_type == "Concat" or moves(self.net, item)
        return moved and name in self.tensors and all(self.tensors.get(s) == self.tensors[name] for s in sources)

    def _write_pairs(self, name: str, bounded: bool = False) -> None:
        if name in self.tensors:
            cell = self.tensors[name]
            self._write_pair(name, name, Cell(cell.step, cell.zero) if bounded else cell)
        own = {cell for (_, read), cell in self.reads.items() if read == name}
        for cell in sorted(own, key=lambda cell: (cell.step, cell.zero, cell.low, cell.high)):
            source = f"{name}/real" if name in self.tensors else name
            self._write_pair(source, _own_name(name, cell).removesuffix("/real"), cell)

    def _write_pair(self, source: str, name: str, cell: Cell) -> None:
        constants = {f"{name}/step": np.float32(cell.step), f"{name}/zero": np.uint8(cell.zero)}
        self.net.constants |= {key: np.asarray(value) for key, value in constants.items()}
        integers = f"{name}/integers"
        self.net.nodes.append(node("QuantizeLinear", [source, *constants], integers))
        if (cell.low, cell.high) != (0, LARGEST):
            bounds = [f"{name}/low", f"{name}/high"]
            for key, bound in zip(bounds, (cell.low, cell.high), strict=True):
                self.net.constants[key] = np.asarray(bound, np.uint8)
            self.net.nodes.append(node("Clip", [integers, *bounds], f"{name}/clipped"))
            integers = f"{name}/clipped"
        self.net.nodes.append(node("DequantizeLinear", [integers, *constants], f"{name}/real"))


def moves(net: Net, item: Node) -> bool:
    """Does it only move entries of its first input, with zeros beside them at most?"""
    if item.op_type not in MOVES:
        return False
    options = attributes(item)
    if item.op_type == "Pad":
        value = item.input[2] if len(item.input) > 2 else ""
        return bool(options.get("mode", "constant") != "constant" or not value or net.scalar(value) == 0)
    return bool(item.op_type != "Resize" or options.get("mode", "nearest") == "nearest")


def _entries(item: Node) -> list[str]:
    """The outputs that hold entries of the input: the first, of a Split all."""
    return list(item.output if item.op_type == "Split" else item.output[:1])


def _bounds(net: Net, item: Node) -> tuple[float | None, float | None] | None:
    if item.op_type == "Relu":
        return 0.0, None
    found: list[float | None] = []
    for name in [*item.input[1:], "", ""][:2]:
        found.append(net.scalar(name) if name else None)
        if name and found[-1] is None:
            return None
    return found[0], found[1]


def _own_name(name: str, cell: Cell) -> str:
    return f"{name}/{cell.step!r}/{cell.zero}/{cell.low}/{cell.high}/real"
