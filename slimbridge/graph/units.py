"""Units: the parameter entries that must be removed together; and groups, the scope in which units compete."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from slimbridge.graph.model import Graph
from slimbridge.graph.provenance import walked
from slimbridge.graph.walk import Producer, Rules, Walk


@dataclass(frozen=True)
class UnitProducer:
    """A layer that makes channels.

    Attributes:
        layer: its path.
        kind: "conv", "grouped" (convolution), "transposed" (convolution) or "linear".
        weight: its weight's name.
        units: the unit of each of its output channels, shape (out,).
    """

    layer: str
    kind: str
    weight: str
    units: NDArray[np.int64]


@dataclass(frozen=True)
class ChannelGroup:
    """Layers whose output channels share units, in graph order, and the removable units in channel order."""

    producers: tuple[UnitProducer, ...]
    units: NDArray[np.int64]

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers."""
        return tuple(producer.layer for producer in self.producers)


@dataclass(frozen=True)
class Units:
    """The removable structure of one model.

    Attributes:
        touched: (parameter, axis) -> unit of each entry along that axis.
        frozen: unit -> why it must stay.
        producers: the layers that issue channels, each weight once, in graph order.
        followers: depthwise convolutions ("depthwise"), which issue none: their outputs go with their inputs.
        heads: layer path -> unit of each of its attention heads, where heads were asked for.
        inexact: units that a LayerNorm normalises: removing them is not zeroing them.
        products: index of a node that multiplies two activations -> (sizes of its output's axes and of the contracted
            axis, {axis: unit of each entry}).
    """

    touched: Mapping[tuple[str, int], NDArray[np.int64]]
    frozen: Mapping[int, str]
    producers: tuple[UnitProducer, ...]
    followers: tuple[UnitProducer, ...] = ()
    heads: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    inexact: frozenset[int] = frozenset()
    products: Mapping[int, tuple[tuple[int, ...], Mapping[int, NDArray[np.int64]]]] = field(default_factory=dict)

    def stays(self, removed: Collection[int]) -> NDArray[np.bool_]:
        """By unit: does it stay?"""
        known = (*self.touched.values(), *(p.units for p in self.producers))
        highest = max((int(units.max(initial=0)) for units in known), default=0)
        result = np.ones(highest + 1, dtype=bool)
        result[np.fromiter(removed, np.int64, len(removed))] = False
        return result

    def kept(self, removed: Collection[int]) -> dict[str, dict[int, tuple[int, ...]]]:
        """Parameter -> axis -> entries that stay, for the parameters that lose any."""
        stays_of = self.stays(removed)
        result: dict[str, dict[int, tuple[int, ...]]] = {}
        for (name, axis), units in sorted(self.touched.items()):
            stays = stays_of[units]
            if not stays.all():
                result.setdefault(name, {})[axis] = tuple(np.flatnonzero(stays).tolist())
        return result

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups that have removable units, in graph order."""
        if not self.producers:
            return ()
        frozen = np.fromiter(self.frozen, np.int64, len(self.frozen))
        free = [producer.units[~np.isin(producer.units, frozen)] for producer in self.producers]
        rows = np.repeat(np.arange(len(free)), [len(units) for units in free])
        columns = np.concatenate(free) if free else np.empty(0, np.int64)
        width = int(columns.max(initial=-1)) + 1
        links = coo_array((np.ones(rows.size, np.int64), (rows, columns)), shape=(len(free), max(width, 1))).tocsr()
        _, labels = connected_components(links @ links.T, directed=False)
        groups = []
        for label in dict.fromkeys(labels.tolist()):
            members = [index for index in range(len(free)) if labels[index] == label]
            units = np.concatenate([free[index] for index in members])
            if units.size:
                _, first = np.unique(units, return_index=True)
                chosen = tuple(self.producers[index] for index in members)
                groups.append(ChannelGroup(chosen, units[np.sort(first)]))
        return tuple(groups)

    def why_frozen(self, producer: UnitProducer) -> str | None:
        """The reason when none of the layer's channels may go, else None."""
        reason = None
        for unit in reversed(producer.units.tolist()):
            reason = self.frozen.get(unit)
            if reason is None:
                return None
        return reason


def find_units(graph: Graph, rules: Rules | None = None) -> Units:
    """The units of a model.

    Args:
        graph: the traced model.
        rules: what may go. A width that a model's code has written in (`reshape(x, (-1, 512))`) cannot be told from a
            computed one in a trace; `Rules.freeze_attention` and `Rules.freeze_reshapes` are for such models.
    """
    walk = walked(graph, rules or Rules())
    ledger = walk.ledger
    _freeze_outside_uses(walk)
    labels = ledger.components()
    heads = _united_heads(walk, labels)
    frozen: dict[int, str] = {}
    for entry in ledger.freezes:
        for unit in np.unique(labels[entry.ids]).tolist():
            frozen.setdefault(unit, entry.reason)
    if walk.rules.heads:
        cut = np.concatenate([np.empty(0, np.int64), *heads.values()])
        for unit in np.setdiff1d(labels, cut).tolist():
            frozen.setdefault(unit, "it is no attention head, and heads alone are to go")
    touched = {key: labels[ids] for key, ids in ledger.touched.items()}
    return Units(
        touched,
        frozen,
        _labelled(walk.producers, labels),
        _labelled(walk.followers, labels),
        heads,
        frozenset(unit for ids in walk.inexact for unit in labels[ids].tolist()),
        {item.node: (item.sizes, {axis: labels[ids] for axis, ids in item.ids.items()}) for item in walk.products},
    )


def _labelled(layers: Sequence[Producer], labels: NDArray[np.int64]) -> tuple[UnitProducer, ...]:
    """Each weight once, as its layer ran first, with units in place of ids."""
    found = {p.weight: UnitProducer(p.layer, p.kind, p.weight, labels[p.ids]) for p in reversed(layers)}
    return tuple(reversed(found.values()))


def _united_heads(walk: Walk, labels: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    """Layer path -> units of its heads; a layer that cuts its heads in unlike ways has them frozen."""
    found: dict[str, NDArray[np.int64]] = {}
    for path, ids in walk.heads:
        units = labels[ids]
        if not np.array_equal(found.setdefault(path, units), units):
            reason = f"the heads of layer '{path}' are not cut alike for all that it multiplies"
            walk.ledger.freeze(np.flatnonzero(np.isin(labels, np.concatenate([units, found[path]]))), reason)
    return found


def _freeze_outside_uses(walk: Walk) -> None:
    """A layer's parameter that is also read outside its layer cannot change its size."""
    outside = {name for node in walk.graph.nodes if node.kind == "constant" for name in node.params.values()}
    inside = {name for node in walk.graph.nodes if node.kind != "constant" for name in node.params.values()}
    for (name, _), ids in walk.ledger.touched.items():
        if name in outside and name in inside:
            walk.ledger.freeze(ids, f"its parameter '{name}' is also used outside the layer")
