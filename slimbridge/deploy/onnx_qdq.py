"""From a float ONNX model and a `QuantizeDecision` to an int8 one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from slimbridge.decisions import QuantizeDecision, Site
from slimbridge.deploy.onnx_cells import Cell, Cells
from slimbridge.deploy.onnx_dynamic import make_dynamic
from slimbridge.deploy.onnx_match import Matches, match, weight_readers
from slimbridge.deploy.onnx_net import LAYERS, ModelProto, Net, Node, failures, require
from slimbridge.deploy.onnx_weights import BLOCKS_SINCE, Stored, stored, write_bias, write_weight
from slimbridge.errors import ModelError, listed
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Array
from slimbridge.quantize.grid import to_integers, to_reals


@dataclass(frozen=True)
class QdqReport:
    """What was written.

    Attributes:
        layers: convolution and linear nodes with a constant weight.
        weights: those of them whose weight is stored in integers.
        inputs: those of them that also read their input from a grid.
        placed: sites that stand in the file.
        unmatched: weights and sites that have no counterpart in it.
        notes: what a user should know, one line each.
    """

    layers: int
    weights: int
    inputs: int
    placed: tuple[str, ...]
    unmatched: tuple[str, ...]
    notes: tuple[str, ...] = ()


def quantize(
    model: ModelProto,
    decision: QuantizeDecision,
    weights: Mapping[str, Array],
    sites: Mapping[str, Array],
    inputs: Sequence[Array],
) -> tuple[ModelProto, QdqReport]:
    """Write integer weights, and Q/DQ pairs on the tensors that have a grid.

    Activations are unsigned and weights signed 8-bit integers, which is what CPU runtimes have fast kernels for; a
    grid of the other kind is moved, which changes no value. An activation that only clips (ReLU, ReLU6) before a grid
    becomes bounds of the grid. Grids of fewer bits keep their bounds by a Clip on the integers; weights of at most 4
    bits are packed in the mode "weight_only".

    Biases stay in float, as in the model: rounded to int32 they would move the sums before they are rounded to a grid.
    onnxruntime (1.21 and later) rounds them itself when it fuses a layer, openvino does not need it. Only a linear
    layer whose output is on no grid, as the last one, has an int32 bias of step (input step * weight step), without
    which onnxruntime would compute it in float.

    Args:
        model: a cleaned float model, its weights on their grids and the folds in them.
        decision: grids.
        weights: canonical name -> values on their grid, of all in `decision.weights` at least.
        sites: key of a `Site` -> value in the float pass over `inputs`, of all activations of the decision.
        inputs: of one pass, random or real.

    Raises:
        ModelError: a weight is missing or not on its grid, or nothing was found in the file.
    """
    lost = [name for name in decision.weights if name not in weights]
    if lost:
        raise ModelError(f"no values for the quantized weights {listed(lost)}")
    model, grids = _upgraded(model, decision), decision.activations or decision.dynamic
    wanted = {name: weights[name] for name in decision.weights}
    found = match(model, wanted, {key: sites[key] for key in grids if key in sites}, inputs)
    unmatched = (*found.unmatched, *(key for key in grids if key not in sites))
    if decision.weights and not found.weights:
        raise ModelError("none of the quantized weights was found in the ONNX file")
    writer = _Writer(Net.of(model), decision, weights, found)
    return writer.write(), writer.report(unmatched)


@dataclass
class _Writer:
    net: Net
    decision: QuantizeDecision
    weights: Mapping[str, Array]
    found: Matches
    notes: list[str] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.layers = [n for n in self.net.nodes if n.op_type in LAYERS and n.input[1] in self.net.constants]
        self.total, self.with_weights, self.with_inputs = len(self.layers), 0, 0

    def write(self) -> ModelProto:
        cells = self._cells()
        cells.join()
        cells.spread()
        cells.absorb()
        cells.tighten()
        on_grid = {id(item): cells.seen_by(item, item.input[0]) for item in self.layers}
        self.ends = {id(item) for item in self.layers if item.output[0] not in cells.tensors}
        cells.write()
        for name, grid in self.decision.weights.items():
            if name not in self.found.weights:
                continue
            place, values = self.found.weights[name], self.weights[name]
            if relative(to_reals(to_integers(values, grid), grid), values) > tolerance("export_match").value:
                raise ModelError(f"{name}: its values are not on its grid")
            weight = stored(name, values, grid, place, self.decision.mode == "weight_only")
            readers = weight_readers(self.net, place.initialiser)
            self._place(name, place.initialiser, weight, readers, on_grid)
        return self.net.model()

    def _cells(self) -> Cells:
        """Inputs of a known layer are on a grid for that layer alone, other sites for all who read the tensor."""
        cells = Cells(self.net)
        for key, tensor in self.found.sites.items():
            if key not in self.decision.activations:
                continue
            cell, own = Cell.of(key, self.decision.activations[key]), self._own_reader(key, tensor)
            for item in own:
                cells.reads[id(item), tensor] = cell
            if not own and cells.tensors.setdefault(tensor, cell) != cell:
                self.notes.append(f"{key}: the tensor has another grid already")
            if not own and tensor in self.net.outputs:
                del cells.tensors[tensor]
                self.notes.append(f"{key}: an output of the model stays in float")
        return cells

    def _own_reader(self, key: str, tensor: str) -> list[Node]:
        site = Site.parse(key)
        weight = self.found.weights.get(f"{site.path}.weight" if site.path else "weight")
        if site.side != "input" or site.argument or weight is None:
            return []
        return [n for n in weight_readers(self.net, weight.initialiser) if n.input[0] == tensor]

    def _place(
        self, name: str, initialiser: str, weight: Stored, readers: list[Node], on_grid: Mapping[int, Cell | None]
    ) -> None:
        """Write one weight, and the biases of the nodes that read it."""
        self.with_weights += len(readers)
        left = [item for item in readers if not self._dynamic(name, item, weight)]
        if not left and readers:
            return
        real = write_weight(self.net, initialiser, weight)
        for item in left or self.net.readers().get(initialiser, []):
            for place, read in enumerate(item.input):
                if read == initialiser:
                    item.input[place] = real
        for item in left:
            cell = on_grid.get(id(item))
            self.with_inputs += cell is not None
            last = cell is not None and item.op_type == "Gemm" and id(item) in self.ends
            reason = write_bias(self.net, item, weight, cell) if cell is not None and last else None
            if reason is not None:
                self.notes.append(
                    f"{name}: {reason}; its bias stays in float, and most runtimes then compute the layer so"
                )

    def _dynamic(self, name: str, item: Node, weight: Stored) -> bool:
        """Give a layer a step found at run time; False when the decision has none for it, or it cannot be."""
        for key, tensor in self.found.sites.items():
            grid = self.decision.dynamic.get(key)
            if grid is None or not any(item is own for own in self._own_reader(key, tensor)):
                continue
            reason = make_dynamic(self.net, item, weight, grid)
            if reason is None:
                self.with_inputs += 1
                return True
            self.notes.append(f"{name}: {reason}; its weight is stored in integers and computed with in float")
        return False

    def report(self, unmatched: tuple[str, ...]) -> QdqReport:
        placed = tuple(self.found.sites)
        notes = (*self.notes, *_remarks(self.decision))
        return QdqReport(self.total, self.with_weights, self.with_inputs, placed, unmatched, notes)


def _remarks(decision: QuantizeDecision) -> list[str]:
    grids = [*decision.weights.values(), *decision.activations.values()]
    narrow = sum(grid.high - grid.low < 128 for grid in grids)
    made = []
    if decision.mode == "weight_only":
        made.append("only weights are integers: a smaller file; not faster where the runtime unpacks them to float")
    elif narrow:
        made.append(f"{narrow} grids of fewer than 8 bits are stored in 8 bits: no smaller and no faster than 8 bits")
    if any(grid.rounding == "away" for grid in decision.activations.values()):
        made.append("activations halfway between two integers are rounded to even, in training away from zero")
    return made


def _upgraded(model: ModelProto, decision: QuantizeDecision) -> ModelProto:
    """The model, in the opset that has blocks and 4-bit integers where those are needed."""
    packed = decision.mode == "weight_only"
    needed = any(grid.group or (packed and grid.high - grid.low < 16) for grid in decision.weights.values())
    if not needed or Net.of(model).opset >= BLOCKS_SINCE:
        return model
    onnx = require("onnx")
    try:
        return Net.of(onnx.version_converter.convert_version(model, BLOCKS_SINCE)).model()
    except failures() as error:
        raise ModelError(f"the ONNX file cannot be brought to opset {BLOCKS_SINCE}: {error}") from error
