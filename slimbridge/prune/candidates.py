"""The weights that masks may be laid over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from slimbridge.graph import Graph
from slimbridge.ports import Array, Layer
from slimbridge.prune.patterns import Bools

KINDS = {"conv": "conv", "conv_transpose": "transposed", "linear": "linear"}
"""From the port's kinds of layers to the plan's."""


@dataclass(frozen=True)
class Candidate:
    """A weight that may be masked.

    Attributes:
        weight: canonical name.
        paths: of the layers that use it; several when it is tied.
        kind: "conv", "grouped", "transposed" or "linear".
        groups: of the convolution; None where no trace says it.
    """

    weight: str
    paths: tuple[str, ...]
    kind: str
    groups: int | None

    def matches(self, pattern: str) -> bool:
        """Does the pattern (fnmatch) name one of its layers?"""
        return any(fnmatchcase(path, pattern) for path in self.paths)

    def rows(self, array: Array) -> Array:
        """The array as (out, in, *kernel): outputs first also for a transposed convolution, (in, out / groups, ...)."""
        if self.kind != "transposed":
            return array
        groups = self.groups or 1
        blocks = array.reshape(groups, array.shape[0] // groups, *array.shape[1:]).swapaxes(1, 2)
        return blocks.reshape(groups * array.shape[1], array.shape[0] // groups, *array.shape[2:])

    def canonical(self, rows: Bools, shape: tuple[int, ...]) -> Bools:
        """Back from `rows` to the canonical shape."""
        if self.kind != "transposed":
            return rows
        groups = self.groups or 1
        return rows.reshape(groups, shape[1], shape[0] // groups, *shape[2:]).swapaxes(1, 2).reshape(shape)


def find_candidates(layers: Sequence[Layer], graph: Graph | None) -> tuple[Candidate, ...]:
    """Each convolution's and linear layer's weight once, in order of definition.

    Args:
        layers: of the model.
        graph: tells the groups of convolutions; None leaves them unknown.
    """
    groups: dict[str, int] = {}
    for node in graph.nodes if graph is not None else ():
        if node.kind == "conv":
            groups[node.params["weight"]] = int(node.attrs.get("groups", 1))
    found: dict[str, Candidate] = {}
    for layer in layers:
        if layer.kind not in KINDS:
            continue
        weight = layer.params["weight"]
        kind = "grouped" if layer.kind == "conv" and groups.get(weight, 1) > 1 else KINDS[layer.kind]
        paths = (*found[weight].paths, layer.path) if weight in found else (layer.path,)
        found[weight] = Candidate(weight, paths, kind, groups.get(weight))
    return tuple(found.values())
