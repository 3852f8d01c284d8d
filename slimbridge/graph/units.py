"""Units: the parameter entries that must be removed together; and groups, the scope in which units compete."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from slimbridge.graph.model import Graph
from slimbridge.graph.provenance import Walk


@dataclass(frozen=True)
class UnitProducer:
    """A convolution or linear layer and the unit of each of its output channels, shape (out,)."""

    layer: str
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
    """

    touched: Mapping[tuple[str, int], NDArray[np.int64]]
    frozen: Mapping[int, str]
    producers: tuple[UnitProducer, ...]

    def kept(self, removed: Collection[int]) -> dict[str, dict[int, tuple[int, ...]]]:
        """Parameter -> axis -> entries that stay, for the parameters that lose any."""
        highest = max((int(units.max(initial=0)) for units in self.touched.values()), default=0)
        stays_of = np.ones(highest + 1, dtype=bool)
        stays_of[np.fromiter(removed, np.int64, len(removed))] = False
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
        reasons = [self.frozen.get(int(unit)) for unit in producer.units]
        return None if any(reason is None for reason in reasons) else reasons[0]


def find_units(graph: Graph, freeze_reshapes: bool = False) -> Units:
    """The units of a model.

    Args:
        graph: the traced model.
        freeze_reshapes: freeze channels that pass through a reshape or split, also one that keeps their axis whole,
            for models that write the extents into their code (`reshape(x, (-1, 512))`; a computed extent cannot be
            told from a written one in a trace).
    """
    walk = Walk(graph, freeze_reshapes).run()
    ledger = walk.ledger
    _freeze_outside_uses(walk)
    labels = ledger.components()
    frozen: dict[int, str] = {}
    for entry in ledger.freezes:
        for unit in np.unique(labels[entry.ids]).tolist():
            frozen.setdefault(unit, entry.reason)
    touched = {key: labels[ids] for key, ids in ledger.touched.items()}
    producers = {p.weight: UnitProducer(p.layer, p.weight, labels[p.ids]) for p in reversed(walk.producers)}
    return Units(touched, frozen, tuple(reversed(producers.values())))


def _freeze_outside_uses(walk: Walk) -> None:
    """A layer's parameter that is also read outside its layer cannot change its size."""
    outside = {name for node in walk.graph.nodes if node.kind == "constant" for name in node.params.values()}
    for (name, _), ids in walk.ledger.touched.items():
        if name in outside:
            walk.ledger.freeze(ids, f"its parameter '{name}' is also used outside the layer")
