"""Which units of a channel group go."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import ModelError
from slimbridge.graph import ChannelGroup
from slimbridge.plan.registries import Importance
from slimbridge.ports import Array


def remove_count(channels: int, pruning_ratio: float) -> int:
    """Channels to remove of `channels`: min(n - 1, round(n * ratio)), half to even, so one always stays.

    Source: PaddleSlim 2.6.0, dygraph/prune/filter_pruner.py.
    """
    return min(channels - 1, round(channels * pruning_ratio))


def unit_importance(group: ChannelGroup, weights: Mapping[str, Array], importance: Importance) -> NDArray[np.float64]:
    """Importance of each unit of the group: the mean over all its output channels in all the group's layers.

    Args:
        group: the units and the layers that produce them.
        weights: canonical name -> weight.
        importance: the criterion.

    Returns:
        shape (units,), in the order of `group.units`.

    Raises:
        ModelError: a weight has entries that are not finite.
    """
    total: NDArray[np.float64] = np.zeros(group.units.size)
    count: NDArray[np.float64] = np.zeros(group.units.size)
    order = np.argsort(group.units, kind="stable")
    for producer in group.producers:
        weight = weights[producer.weight]
        values = importance(weight)
        if not np.isfinite(values).all():  # NaN and infinity in a weight show in its importance
            bad = int(np.size(weight) - np.isfinite(weight).sum())
            raise ModelError(f"layer '{producer.layer}': {bad} of {weight.size} entries of its weight are not finite")
        place = np.searchsorted(group.units, producer.units, sorter=order)
        place = order[np.minimum(place, order.size - 1)]
        inside = group.units[place] == producer.units
        np.add.at(total, place[inside], values[inside])
        np.add.at(count, place[inside], 1.0)
    return np.asarray(total / np.maximum(count, 1.0))


def least_important(values: NDArray[np.float64], count: int, stays: Collection[int] = frozenset()) -> NDArray[np.int64]:
    """Positions of the `count` smallest values, ascending; of equal values the one with the lower index goes first.

    Args:
        values: importances, shape (units,).
        count: how many; fewer are given where fewer may go.
        stays: positions that are passed over.
    """
    order = np.argsort(values, kind="stable")
    return np.sort(order[~np.isin(order, list(stays))][:count])


def last_of_each_layer(group: ChannelGroup, values: NDArray[np.float64]) -> set[int]:
    """Positions of the units without which a layer of the group could lose all its channels.

    Layers of unequal width share a group when their channels are joined and then added to others: the most
    important unit of each of them stays (of equal ones that with the highest index). A layer that has channels
    outside the group keeps those.
    """
    order = np.argsort(values, kind="stable")
    if all(producer.units.size == group.units.size for producer in group.producers):
        return {int(order[-1])}
    ranked = group.units[order]
    stays = set()
    for producer in group.producers:
        own = np.isin(ranked, producer.units)
        if np.isin(producer.units, group.units).all():
            stays.add(int(order[np.flatnonzero(own)[-1]]))
    return stays
