"""Which units of the channel groups go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np
from numpy.typing import NDArray

from slimbridge.graph import ChannelGroup
from slimbridge.prune.presets import Definition

Values = NDArray[np.float64]
Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Amount:
    """How much of one group is to go.

    Attributes:
        ratio: share to remove, 0..1; 0 leaves the group as it is.
        before: units that the group had when counting starts, at least as many as now.
        own: the ratio is the group's own: it competes with no other group.
    """

    ratio: float
    before: int
    own: bool = False


def remove_count(channels: int, pruning_ratio: float, rule: str = "round") -> int:
    """Channels to remove of `channels`; one always stays.

    Args:
        channels: how many there are, n.
        pruning_ratio: share to remove, 0..1.
        rule: "round": min(n - 1, round(n * ratio)), half to even, as PaddleSlim 2.6.0 (dygraph/prune/l1norm_pruner.py);
            "ceil_kept": n - int(n * (1 - ratio)), at most n - 1, as Torch-Pruning 1.6.1
            (pruner/algorithms/base_pruner.py).
    """
    return min(channels - 1, COUNT_RULES[rule](channels, pruning_ratio))


COUNT_RULES: Mapping[str, Callable[[int, float], int]] = {
    "round": lambda channels, ratio: round(channels * ratio),
    "ceil_kept": lambda channels, ratio: channels - int(channels * (1 - ratio)),
}


def choose(
    groups: Sequence[ChannelGroup],
    values: Sequence[Values],
    amounts: Sequence[Amount],
    definition: Definition,
    structures: Sequence[Hashable] = (),
) -> tuple[Positions, ...]:
    """The units that go.

    Units compete within their group ("local"), with all groups ("global") or with groups of equal structure
    ("isomorphic"); of competing groups those with equal ratios, and a group with a ratio of its own with no other. Of
    what competes the share is counted as a whole and the least important units go, of equal ones those of the earlier
    group and of the lower index. No group goes below `min_channels`, above `max_ratio`, or to where one of its layers
    would have no channel left; then as many units come back as `round_to` asks for, the most important first.

    Args:
        groups: the channel groups.
        values: importances of each group's units.
        amounts: how much of each.
        definition: count rule, selection and limits.
        structures: of each group (`slimbridge.prune.coupled.structures`), for isomorphic selection.

    Returns:
        for each group the positions of the units that go, ascending.
    """
    chosen = [np.empty(0, np.int64) for _ in groups]
    for members in _scopes(amounts, definition.selection, structures):
        found = _in_scope(
            [groups[index] for index in members],
            [values[index] for index in members],
            [amounts[index] for index in members],
            definition,
        )
        for index, positions in zip(members, found, strict=True):
            chosen[index] = positions
    return tuple(chosen)


def _scopes(amounts: Sequence[Amount], selection: str, structures: Sequence[Hashable]) -> Iterator[list[int]]:
    """Indices of the groups that compete, for each competition."""
    if selection == "isomorphic" and len(structures) != len(amounts):
        raise ValueError("isomorphic selection needs the structure of each group")
    scopes: dict[Hashable, list[int]] = {}
    for index, amount in enumerate(amounts):
        alone = selection == "local" or amount.own
        with_whom: Hashable = structures[index] if selection == "isomorphic" else None
        key: Hashable = index if alone else (amount.ratio, with_whom)
        if amount.ratio > 0:
            scopes.setdefault(key, []).append(index)
    yield from scopes.values()


def _in_scope(
    groups: Sequence[ChannelGroup], values: Sequence[Values], amounts: Sequence[Amount], definition: Definition
) -> list[Positions]:
    ranked = [_removable(group, own) for group, own in zip(groups, values, strict=True)]
    limits = [min(_limit(a, g.units.size, definition), r.size) for a, g, r in zip(amounts, groups, ranked, strict=True)]
    ranked = [order[:limit] for order, limit in zip(ranked, limits, strict=True)]
    before = sum(amount.before for amount in amounts)
    gone = before - sum(group.units.size for group in groups)
    count = max(0, remove_count(before, amounts[0].ratio, definition.count_rule) - gone)
    owner = np.repeat(np.arange(len(groups)), [order.size for order in ranked])
    joined = np.concatenate([own[order] for own, order in zip(values, ranked, strict=True)])
    least = owner[np.argsort(joined, kind="stable")[:count]]
    counts = np.bincount(least, minlength=len(groups)).tolist()
    return [
        np.sort(order[: _rounded(group.units.size, goes, definition.round_to)])
        for group, order, goes in zip(groups, ranked, counts, strict=True)
    ]


def _removable(group: ChannelGroup, values: Values) -> Positions:
    """Positions that may go, the least important first."""
    order = np.argsort(values, kind="stable")
    return np.asarray(order[~np.isin(order, list(last_of_each_layer(group, values)))])


ROUNDING = 1e-9
"""A product that is whole but for the last bits (10 * 0.3 is below 3) counts as whole."""


def _limit(amount: Amount, units: int, definition: Definition) -> int:
    """Most units that may go now."""
    stays = definition.min_channels
    if definition.max_ratio is not None:
        stays = max(stays, amount.before - floor(amount.before * definition.max_ratio + ROUNDING))
    return max(0, units - stays)


def _rounded(units: int, goes: int, multiple: int) -> int:
    """Fewer may go, so that a multiple of `multiple` stays; none where that would be more than there are."""
    stays = -(-(units - goes) // multiple) * multiple
    return max(0, units - stays)


def last_of_each_layer(group: ChannelGroup, values: Values) -> Collection[int]:
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
