"""What is coupled to a channel: the axes of parameters that lose an entry with it, and which of them count."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slimbridge.graph import ChannelGroup, Graph, Node, Units
from slimbridge.plan.registries import Rows
from slimbridge.ports import Array
from slimbridge.prune.evidence import Evidence

Side = Literal["out", "in", "norm"]
STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True)
class CoupledAxis:
    """One axis of one parameter.

    Attributes:
        layer: path of the layer that uses the parameter.
        parameter: canonical name.
        axis: of its canonical shape.
        role, kind, side: see `Rows`.
        units: the unit of each entry along the axis.
    """

    layer: str
    parameter: str
    axis: int
    role: str
    kind: str
    side: Side
    units: NDArray[np.int64]


def _weights_of_layers(axis: CoupledAxis) -> bool:
    return axis.role == "weight" and axis.kind in ("conv", "linear") and axis.side != "norm"


RATED: Mapping[str, Callable[[CoupledAxis], bool]] = {
    "producers": lambda axis: axis.role == "weight" and axis.side == "out",
    "coupled": lambda axis: True,
    "norms": lambda axis: axis.role == "weight" and axis.kind == "batch_norm",
    "layers": _weights_of_layers,
    "layers_and_layer_norms": lambda axis: (
        _weights_of_layers(axis) or (axis.role == "weight" and axis.kind == "layer_norm")
    ),
    "layers_and_norms": lambda axis: (
        _weights_of_layers(axis) or (axis.role == "weight" and axis.kind in ("batch_norm", "layer_norm"))
    ),
}
"""Word -> does the axis count? The first three are the plan's; the last three, without biases and depthwise
convolutions, are what Torch-Pruning 1.6.1 counts (pruner/importance.py)."""


def coupled_axes(graph: Graph, units: Units, rated: str = "coupled") -> tuple[CoupledAxis, ...]:
    """The axes that channels reach, in graph order, of a layer the outputs first; running statistics are left out.

    Args:
        graph: the traced model.
        units: its units.
        rated: a word of `RATED`.
    """
    counts = RATED[rated]
    axes: dict[str, list[int]] = {}
    for name, axis in units.touched:
        axes.setdefault(name, []).append(axis)
    producing = {producer.weight for producer in units.producers}
    found: dict[str, tuple[CoupledAxis, ...]] = {}
    for node in graph.nodes:
        for role, name in sorted(node.params.items(), key=lambda item: item[0] != "weight"):
            if name in axes and name not in found and role not in STATISTICS:
                entries = (_entry(node, role, name, axis, units, producing) for axis in sorted(axes[name]))
                found[name] = tuple(sorted(entries, key=lambda entry: entry.side != "out"))
    return tuple(entry for entries in found.values() for entry in entries if counts(entry))


def _entry(node: Node, role: str, name: str, axis: int, units: Units, producing: set[str]) -> CoupledAxis:
    side: Side = "norm"
    if node.params.get("weight") in producing:
        outputs = 1 if node.attrs.get("transposed", False) and role == "weight" else 0
        side = "out" if axis == outputs else "in"
    return CoupledAxis(node.name, name, axis, role, node.kind, side, units.touched[name, axis])


def rows_of(
    axis: CoupledAxis,
    weights: Mapping[str, Array],
    evidence: Evidence,
    seed: int = 0,
    only: NDArray[np.int64] | None = None,
) -> Rows:
    """The parameter with that axis first, and the evidence for it.

    Args:
        axis: which.
        weights: canonical name -> array.
        evidence: what was collected.
        seed: of importances that draw.
        only: entries of the axis that are wanted; None takes all.
    """

    def first(arrays: Mapping[str, Array]) -> Array | None:
        if axis.parameter not in arrays:
            return None
        rows = np.moveaxis(arrays[axis.parameter], axis.axis, 0)
        return rows if only is None else rows[only]

    weight = first(weights)
    assert weight is not None
    activation = None
    if axis.side == "out" and axis.layer in evidence.activations:
        # The rows of a grouped transposed convolution make one channel of each of its groups.
        seen = evidence.activations[axis.layer]
        activation = {key: values.reshape(-1, axis.units.size).mean(axis=0) for key, values in seen.items()}
        activation = activation if only is None else {key: values[only] for key, values in activation.items()}
    return Rows(
        parameter=axis.parameter,
        role=axis.role,
        kind=axis.kind,
        side=axis.side,
        weight=weight,
        gradient=first(evidence.gradients),
        squared_gradient=first(evidence.squared_gradients),
        activation=activation,
        seed=seed,
    )


@dataclass(frozen=True)
class Places:
    """Where the units of some groups lie in one flat array, group after group.

    Attributes:
        of_unit: by unit: its place, or -1 outside the groups.
        group_of: by place: the group's index; one entry more, -1, for units outside.
        ends: of each group in the flat array.
    """

    of_unit: NDArray[np.int64]
    group_of: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, units: Units, groups: Sequence[ChannelGroup]) -> Places:
        """The places of the groups' units."""
        highest = max((int(along.max(initial=-1)) for along in units.touched.values()), default=-1)
        wanted = np.concatenate([np.empty(0, np.int64), *(group.units for group in groups)])
        of_unit = np.full(max(highest, int(wanted.max(initial=-1))) + 1, -1, np.int64)
        of_unit[wanted] = np.arange(wanted.size)
        sizes = [group.units.size for group in groups]
        return cls(of_unit, np.append(np.repeat(np.arange(len(groups)), sizes), -1), np.cumsum(sizes))

    def within(self, axis: CoupledAxis) -> Iterator[tuple[int, NDArray[np.int64] | None, NDArray[np.int64]]]:
        """(group, entries of the axis or None for all, their places) for each group that the axis meets.

        Of a layer's outputs all entries are given, those outside (frozen ones) with place -1: a filter is compared
        with all filters of its layer.
        """
        places = self.of_unit[axis.units]
        met = self.group_of[places]
        for group in np.unique(met[met >= 0]).tolist():
            if axis.side == "out" or (met == group).all():
                yield group, None, np.where(met == group, places, -1)
            else:
                only = np.flatnonzero(met == group)
                yield group, only, places[only]


def structures(graph: Graph, units: Units, groups: Sequence[ChannelGroup]) -> tuple[Hashable, ...]:
    """For each group what its channels are made of; groups with equal structures are isomorphic.

    The structure is the sequence, in graph order, of (kind, side, role, kernel size) of the coupled axes. The numbers
    of channels, on either side, are left free: they differ between the stages of one network.

    Source: Fang et al. 2024, "Isomorphic Pruning for Vision Models", section 3.2; Torch-Pruning 1.6.1
    (pruner/algorithms/base_pruner.py) compares types and sides in the same way, without the kernel.
    """
    places = Places.of(units, groups)
    found: list[list[Hashable]] = [[] for _ in groups]
    for axis in coupled_axes(graph, units):
        kernel = tuple(graph.parameters[axis.parameter][2:])
        for group, _, _ in places.within(axis):
            found[group].append((axis.kind, axis.side, axis.role, kernel))
    return tuple(tuple(items) for items in found)
