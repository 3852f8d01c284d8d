"""Placement: which tensors of a model are put on integer grids."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from slimbridge.decisions import Fold, Site, Skipped
from slimbridge.graph import Call, Graph, Node

CLIPS = frozenset(("relu", "relu6", "hardtanh", "clip", "clamp"))
"""Activations that an integer layer computes by clipping its output, so that what they are given needs no grid."""

_SINGLE = frozenset(
    (
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "silu",
        "swish",
        "leaky_relu",
        "gelu",
        "elu",
        "tanh",
        "mish",
        "prelu",
        "scale",
    )
)
"""Activations that are computed from integers to integers."""
_SAME_VALUES = frozenset(("dropout", "identity"))
_POOLS_SPACE = ((2, 3), (-2, -1), (2,), (3,))


@dataclass(frozen=True)
class Placement:
    """The tensors to be quantized.

    Attributes:
        sites: in the order of the graph.
        reads: layer path -> the site that holds its input, for each convolution and linear layer that has one.
        skipped: tensors that should have a grid, and why they have none.
    """

    sites: tuple[Site, ...]
    reads: Mapping[str, tuple[Site, ...]] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()


def place_layers(paths: Collection[str]) -> Placement:
    """The inputs of these layers, each layer by itself."""
    return Placement(tuple(Site(path) for path in paths), {path: (Site(path),) for path in paths})


def place_full(graph: Graph, paths: Collection[str], folds: Collection[Fold]) -> Placement:
    """All tensors that a deployment engine keeps in integers.

    These are the inputs and outputs of the given layers, of sums and products of two activations, of average pools,
    concatenations and of what is computed on single entries between them. A tensor between a layer and a clipping
    activation needs no grid, nor does one that data movement or a max-pool makes of another: it has that one's.

    Args:
        graph: of the model, with its module calls.
        paths: the layers that are quantized.
        folds: BatchNorms that are part of the layer before them.
    """
    return _Placing(graph, frozenset(paths), folds).placement()


class _Placing:
    def __init__(self, graph: Graph, paths: frozenset[str], folds: Collection[Fold]) -> None:
        graph = _without_copies(graph)
        self.graph, self.paths = graph, paths
        self.folded = {fold.scale for fold in folds}
        self.makers = {tensor: node for node in graph.nodes for tensor in node.outputs}
        self.readers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for tensor in node.inputs:
                self.readers.setdefault(tensor, []).append(node)
        self.constants = self._constants()
        self.given, self.taken, self.counts = _addresses(graph.calls)
        self.leaves = self.counts.keys() - {path.rpartition(".")[0] for path in self.counts}

    def placement(self) -> Placement:
        wanted: dict[int, None] = {}
        for node in self.graph.nodes:
            wanted.update(dict.fromkeys(map(self._root, self._on_grid(node))))
        sites: dict[Site, None] = {}
        lost: dict[str, str] = {}
        found: dict[int, tuple[Site, ...]] = {}
        for tensor in wanted:
            found[tensor] = self._sites(tensor)
            sites.update(dict.fromkeys(found[tensor]))
            if not found[tensor] and not self._inside(tensor):
                maker = self.makers[tensor]
                lost[f"{maker.name or 'the model'}: {maker.attrs.get('op', maker.kind)}"] = (
                    "no module gives this tensor, and functions of the same forward read it; made by a module, as "
                    "nn.ReLU in place of a function relu, it would be reached"
                )
        reads = self._reads(found, sites)
        return Placement(tuple(sites), reads, tuple(Skipped(layer=k, reason=v) for k, v in lost.items()))

    def _reads(self, found: Mapping[int, tuple[Site, ...]], sites: dict[Site, None]) -> dict[str, tuple[Site, ...]]:
        """The sites of the layers' inputs; a layer whose input no other address reaches gets its own."""
        reads: dict[str, tuple[Site, ...]] = {}
        for node in self._layers():
            here = found.get(self._root(node.inputs[0]), ()) or (Site(node.name),)
            sites.update(dict.fromkeys(here))
            reads[node.name] = (*reads.get(node.name, ()), *here)
        return reads

    def _layers(self) -> list[Node]:
        return [node for node in self.graph.layer_nodes() if node.name in self.paths]

    def _on_grid(self, node: Node) -> list[int]:
        """The tensors that a node, computed in integers, reads and makes."""
        if node.kind in ("conv", "linear"):
            return [node.inputs[0], *self._made(node)] if node.name in self.paths else []
        data = [tensor for tensor in node.inputs if tensor not in self.constants]
        pairs = node.kind == "binary" and node.attrs.get("op") in ("add", "mul") and len(data) == 2
        pools = node.kind == "pool" and node.attrs.get("op") == "avg"
        pools = pools or (
            node.kind == "reduce" and node.attrs.get("op") == "mean" and node.attrs["axes"] in _POOLS_SPACE
        )
        single = node.kind == "elementwise" and node.attrs.get("op") in _SINGLE
        if pairs or pools or single or node.kind in ("concat", "resize"):
            return [*data, *self._made(node)]
        return []

    def _made(self, node: Node) -> list[int]:
        """The output, or what a BatchNorm that is folded in and a clipping activation make of it; no model output."""
        tensor = node.outputs[0]
        readers = self.readers.get(tensor, [])
        while len(readers) == 1 and tensor not in self.graph.outputs and self._absorbs(readers[0]):
            tensor = readers[0].outputs[0]
            readers = self.readers.get(tensor, [])
        if tensor in self.graph.outputs or not readers:
            return []
        return [tensor]

    def _absorbs(self, reader: Node) -> bool:
        folded = reader.kind == "batch_norm" and reader.params.get("weight") in self.folded
        return folded or (reader.kind == "elementwise" and reader.attrs.get("op") in CLIPS)

    def _root(self, tensor: int) -> int:
        """The tensor that data movement made this one of, as far back as it can be reached."""
        best, node = tensor, self.makers[tensor]
        while self._moves(node):
            tensor = node.inputs[0]
            node = self.makers[tensor]
            if self._sites(tensor) or not self._sites(best):
                best = tensor
        return best

    def _moves(self, node: Node) -> bool:
        """Does it only move entries, zeros beside them at most?"""
        if node.kind in ("reshape", "transpose", "slice", "split"):
            return True
        return node.kind == "pool" and node.attrs.get("op") == "max"

    def _sites(self, tensor: int) -> tuple[Site, ...]:
        """Where it can be reached: as the output of one call, else as the input of the calls that take it.

        These are the layers that read it, or the outermost modules that do, where functions inside read it too.
        """
        if tensor in self.constants:
            return ()
        if tensor in self.given:
            return (self._site(*self.given[tensor], "output"),)
        takers = self.taken.get(tensor, [])
        leaves = [taker for taker in takers if taker[0] in self.leaves]
        outer = [
            taker for taker in takers if not any(_within(taker[0], other[0]) for other in takers if other != taker)
        ]
        for calls in (leaves, outer):
            if all(any(_within(node.name, path) for path, *_ in calls) for node in self.readers.get(tensor, ())):
                return tuple(self._site(*call, "input") for call in calls)
        return ()  # a function reads it too, and would see it without the grid

    def _inside(self, tensor: int) -> bool:
        """Does it stay within one module that holds no other?"""
        maker = self.makers[tensor].name
        return maker in self.leaves and all(node.name == maker for node in self.readers.get(tensor, []))

    def _site(self, path: str, call: int, position: int, side: str) -> Site:
        once = self.counts[path] == 1
        return Site(path, "output" if side == "output" else "input", position, None if once else call)

    def _constants(self) -> frozenset[int]:
        """Tensors that no input reaches."""
        found: set[int] = set()
        for node in self.graph.nodes:
            if node.kind != "input" and all(tensor in found for tensor in node.inputs):
                found.update(node.outputs)
        return frozenset(found)


def _without_copies(graph: Graph) -> Graph:
    """The graph without operations that give what they are given, which one framework's trace has and another's not."""
    same: dict[int, int] = {}
    for node in graph.nodes:
        if node.kind == "elementwise" and node.attrs.get("op") in _SAME_VALUES:
            same[node.outputs[0]] = same.get(node.inputs[0], node.inputs[0])
    if not same:
        return graph

    def true(tensors: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(same.get(tensor, tensor) for tensor in tensors)

    nodes = (node for node in graph.nodes if not (node.kind == "elementwise" and node.outputs[0] in same))
    return replace(
        graph,
        nodes=tuple(replace(node, inputs=true(node.inputs)) for node in nodes),
        outputs=true(graph.outputs),
        calls=tuple(Call(call.path, true(call.inputs), true(call.outputs)) for call in graph.calls),
    )


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(f"{module}.")


Address = tuple[str, int, int]


def _addresses(calls: tuple[Call, ...]) -> tuple[dict[int, Address], dict[int, list[Address]], dict[str, int]]:
    """Tensor -> the first call that returned it; tensor -> the calls that took it; path -> number of calls."""
    given: dict[int, Address] = {}
    taken: dict[int, list[Address]] = {}
    counts: dict[str, int] = {}
    for call in calls:
        number = counts.get(call.path, 0)
        counts[call.path] = number + 1
        for position, tensor in enumerate(call.outputs):
            if tensor not in call.inputs:
                given.setdefault(tensor, (call.path, number, position))
        for position, tensor in enumerate(call.inputs):
            if tensor not in call.outputs:
                taken.setdefault(tensor, []).append((call.path, number, position))
    return given, taken, counts
