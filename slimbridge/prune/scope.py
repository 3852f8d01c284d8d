"""Which layers a stage prunes, by how much each, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from slimbridge.decisions import Skipped
from slimbridge.errors import ModelError, listed, nearest
from slimbridge.graph import ChannelGroup, Units
from slimbridge.plan.pruning import PruneStage

ALONE = "none of its channels can go alone: they are tied to one another, or it has only one"


@dataclass(frozen=True)
class Scope:
    """The channel groups that a stage may prune.

    Attributes:
        groups: in graph order.
        ratios: of each group its own share (from `layer_ratios`); None: the stage's.
        skipped: layers left alone, with the reason.
    """

    groups: tuple[ChannelGroup, ...]
    ratios: tuple[float | None, ...]
    skipped: tuple[Skipped, ...]

    def without(self, missing: Collection[int], reason: str) -> Scope:
        """Less the groups at some positions, whose layers are left alone for the reason."""
        stays = [index for index in range(len(self.groups)) if index not in missing]
        left = [Skipped(layer=layer, reason=reason) for index in sorted(missing) for layer in self.groups[index].layers]
        groups, ratios = tuple(self.groups[i] for i in stays), tuple(self.ratios[i] for i in stays)
        return Scope(groups, ratios, (*self.skipped, *left))


def scope_of(stage: PruneStage, units: Units) -> Scope:
    """What the stage's patterns and kinds leave.

    Raises:
        ModelError: a pattern matches no layer, or two ratios meet in one group.
    """
    layers = [item.layer for item in (*units.producers, *units.followers)]
    ignored = {
        **{layer: "ignored_layers names it" for layer in matching(stage.ignored_layers, layers, "ignored_layers")},
        **{p.layer: f"ignored_kinds names '{p.kind}'" for p in units.producers if p.kind in stage.ignored_kinds},
    }
    tied = _tied_to(units, {item.layer for item in units.followers if item.layer in ignored})
    ignored = {**tied, **ignored}
    own = _own_ratios(stage.layer_ratios, [producer.layer for producer in units.producers])
    groups, ratios = [], []
    whole = stage.pruning_ratio is not None or stage.target is not None or stage.sensitivity is not None
    found = units.groups()
    for group in found:
        ratio = _ratio_of(group, own)
        taken = not any(layer in ignored for layer in group.layers) and (whole or ratio is not None)
        if taken and group.units.size > 1:
            groups.append(group)
            ratios.append(ratio)
    named = {layer for group in groups for layer in group.layers}
    return Scope(tuple(groups), tuple(ratios), tuple(_skipped(units, found, ignored, named)))


def _tied_to(units: Units, followers: Collection[str]) -> dict[str, str]:
    """Layer -> reason, of the layers whose channels go through an ignored depthwise convolution."""
    found = {}
    for follower in units.followers:
        if follower.layer in followers:
            tied = (p.layer for p in units.producers if np.isin(p.units, follower.units).any())
            found.update(dict.fromkeys(tied, f"its channels go through '{follower.layer}', which ignored_layers names"))
    return found


def matching(patterns: Collection[str], layers: Sequence[str], key: str) -> set[str]:
    """The layers that patterns match; ModelError names one that matches none."""
    matched: set[str] = set()
    for pattern in patterns:
        found = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if not found:
            raise ModelError(
                f"{key}: '{pattern}' matches none of the {len(layers)} convolution and linear layers"
                f"{nearest(pattern, layers)}; they are: {listed(layers)}"
            )
        matched.update(found)
    return matched


def units_before(units: Units, group: ChannelGroup, shapes: Mapping[str, Sequence[int]]) -> int:
    """Units that a group had when the model had other parameter shapes; as many as now where those are not known.

    The group's first layer tells: it has lost as many channels as units, times its channels per unit.

    Args:
        units: of the model now.
        group: of them.
        shapes: parameter -> shape then.
    """
    first = group.producers[0]
    shape = shapes.get(first.weight)
    if shape is None:
        return int(group.units.size)
    inside = np.isin(first.units, group.units)
    per_unit = int(inside.sum()) // max(np.unique(first.units[inside]).size, 1)
    outputs = int(shape[0])
    if first.kind == "transposed":  # (in, out / groups, ...)
        outputs = int(shape[1]) * (first.units.size // units.touched[first.weight, 1].size)
    return int(group.units.size + max(outputs - first.units.size, 0) // max(per_unit, 1))


def _own_ratios(ratios: Mapping[str, float], layers: Sequence[str]) -> dict[str, float]:
    """Layer -> its own ratio; of several patterns that match a layer the last counts."""
    own: dict[str, float] = {}
    for pattern, ratio in ratios.items():
        own.update(dict.fromkeys(matching((pattern,), layers, "layer_ratios"), ratio))
    return own


def _ratio_of(group: ChannelGroup, own: Mapping[str, float]) -> float | None:
    given = {layer: own[layer] for layer in group.layers if layer in own}
    if len(set(given.values())) > 1:
        pairs = listed((f"'{layer}' {ratio}" for layer, ratio in given.items()), 4)
        raise ModelError(f"layer_ratios: these layers share their channels but have unlike ratios: {pairs}")
    return next(iter(given.values()), None)


def _skipped(
    units: Units, groups: Sequence[ChannelGroup], ignored: Mapping[str, str], named: set[str]
) -> Iterator[Skipped]:
    group_of = {layer: group for group in groups for layer in group.layers}
    for producer in units.producers:
        reason = units.why_frozen(producer)
        if reason is None and producer.layer not in named:
            reason = _why_left(producer.layer, group_of.get(producer.layer), ignored)
        if reason is not None:
            yield Skipped(layer=producer.layer, reason=reason)
    lonely = [group.units[0] for group in groups if group.units.size == 1]
    for follower in units.followers:
        reason = units.why_frozen(follower) or ignored.get(follower.layer)
        if reason is None and np.isin(follower.units, lonely).all():
            reason = ALONE
        if reason is not None:
            yield Skipped(layer=follower.layer, reason=reason)


def _why_left(layer: str, group: ChannelGroup | None, ignored: Mapping[str, str]) -> str:
    if layer in ignored:
        return ignored[layer]
    tied = [partner for partner in group.layers if partner in ignored] if group is not None else []
    if tied:
        return f"its channels are tied to '{tied[0]}': {ignored[tied[0]]}"
    if group is not None and group.units.size == 1:
        return ALONE
    return "layer_ratios names neither it nor a layer of its group"
