"""Which ONNX tensor is which weight and which tensor of the model: found by value, as exporters keep no names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimbridge.decisions import Site
from slimbridge.deploy.onnx_net import LAYERS, ModelProto, Net, Node, attributes, run_all
from slimbridge.parity.measure import relative
from slimbridge.parity.tolerances import tolerance
from slimbridge.ports import Array

ACTIVATIONS = ("Relu", "Clip")


@dataclass(frozen=True)
class Weight:
    """Where a weight is: the initialiser's name, and is it stored (in, out) instead of (out, in)?"""

    initialiser: str
    transposed: bool = False


@dataclass(frozen=True)
class Matches:
    """What was found.

    Attributes:
        weights: canonical name -> where it is.
        sites: key of a `Site` -> ONNX tensor.
        unmatched: names and keys without a counterpart.
    """

    weights: Mapping[str, Weight]
    sites: Mapping[str, str]
    unmatched: tuple[str, ...]


def match(
    model: ModelProto, weights: Mapping[str, Array], sites: Mapping[str, Array], inputs: Sequence[Array]
) -> Matches:
    """Match by value: the tensor, or initialiser, of as many entries that agrees best, within "export_match".

    Where several agree equally (a tensor and its reshaped self), the one that the layer's own node reads is taken for
    a site "<layer>", for others the first one that is no layer's output on its way into an activation; the outputs of
    two layers are never one tensor (an average over a single pixel gives what it was given).

    Args:
        model: a cleaned float model.
        weights: canonical name -> values, canonical layout.
        sites: key of a `Site` -> value of that tensor in the pass over `inputs`, in the model's own layout.
        inputs: of one pass, in the order of the graph's inputs; random or real samples, for constant ones make
            different tensors look alike.

    Raises:
        ModelError: onnxruntime cannot run the model.
    """
    net = Net.of(model)
    found = _weights(net, weights)
    values = run_all(model, inputs)
    tensors = _Tensors(net, values)
    placed = {key: name for key, value in sites.items() if (name := tensors.find(key, value, found)) is not None}
    return Matches(
        found, placed, tuple(name for name in (*weights, *sites) if name not in found and name not in placed)
    )


def weight_readers(net: Net, initialiser: str) -> list[Node]:
    """The convolution and linear nodes whose weight it is."""
    return [item for item in net.nodes if item.op_type in LAYERS and list(item.input)[1:2] == [initialiser]]


def _weights(net: Net, weights: Mapping[str, Array]) -> dict[str, Weight]:
    found: dict[str, Weight] = {}
    for name, value in weights.items():
        best, taken = tolerance("export_match").value, {item.initialiser for item in found.values()}
        for initialiser, array in net.constants.items():
            if array.dtype != np.float32 or array.size != value.size or array.size == 0:
                continue
            readers = weight_readers(net, initialiser)
            transposed = bool(readers) and array.ndim == 2 and not _is_out_first(readers[0])
            distance = relative(array.T if transposed else array, np.asarray(value))
            # Layers may have equal weights; each is given its own initialiser as long as there are.
            if distance < best or (distance == best and name in found and found[name].initialiser in taken):
                best, found[name] = distance, Weight(initialiser, transposed)
    return found


def _is_out_first(item: Node) -> bool:
    return item.op_type != "MatMul" and (item.op_type != "Gemm" or bool(attributes(item).get("transB", 0)))


class _Tensors:
    """The float tensors of a pass, ready to be searched."""

    def __init__(self, net: Net, values: Mapping[str, Array]) -> None:
        self.net, self.values = net, values
        self.taken: set[str] = set()
        self.makers, self.readers = net.makers(), net.readers()
        self.norms = {name: float(np.linalg.norm(array.astype(np.float64))) for name, array in values.items()}

    def find(self, key: str, value: Array, weights: Mapping[str, Weight]) -> str | None:
        """The tensor with that value; None when there is none."""
        flat = np.asarray(value, np.float64).ravel()
        norm, allowed = float(np.linalg.norm(flat)), tolerance("export_match").value
        near = [
            (relative(array.ravel(), flat), place, name)
            for place, (name, array) in enumerate(self.values.items())
            if array.size == flat.size and abs(self.norms[name] - norm) <= allowed * norm
        ]
        if not near or min(near)[0] > allowed:
            return None
        best = self.values[min(near)[2]].ravel()
        equal = [name for _, _, name in near if np.array_equal(self.values[name].ravel(), best)]
        return self._preferred(key, equal, weights)

    def _preferred(self, key: str, names: Sequence[str], weights: Mapping[str, Weight]) -> str:
        site = Site.parse(key)
        if site.side == "input" and site.argument == 0:
            own = self._own_nodes(site.path, weights)
            for name in names:
                if any(item.input[0] == name for item in own):
                    return name
        free = [name for name in names if name not in self.taken] or names if site.side == "output" else names
        found = next((name for name in free if not self._goes_into_activation(name)), free[0])
        self.taken.update([found] if site.side == "output" else ())
        return found

    def _own_nodes(self, path: str, weights: Mapping[str, Weight]) -> Iterable[Node]:
        weight = weights.get(f"{path}.weight" if path else "weight")
        return [] if weight is None else weight_readers(self.net, weight.initialiser)

    def _goes_into_activation(self, name: str) -> bool:
        maker, readers = self.makers.get(name), self.readers.get(name, [])
        made = maker is not None and maker.op_type in (*LAYERS, "Add", "BatchNormalization")
        return made and bool(readers) and all(item.op_type in ACTIVATIONS for item in readers)
