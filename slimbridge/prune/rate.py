"""One importance for each unit of each channel group, from all parameters of a channel that count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slimbridge.errors import ModelError
from slimbridge.graph import ChannelGroup, Graph, Units
from slimbridge.plan.registries import Rows
from slimbridge.ports import Array
from slimbridge.prune.coupled import CoupledAxis, Places, coupled_axes, rows_of
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.presets import Definition

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Contribution:
    """What one coupled axis says about units of one group.

    Attributes:
        group: the group's index.
        places: of the units, in the flat array of all groups; several rows may belong to one unit.
        values: the importance of each row.
    """

    group: int
    places: NDArray[np.int64]
    values: Values


@dataclass(frozen=True)
class Collected:
    """All contributions, in graph order, joined.

    Attributes:
        places, values, source: of each row: its unit's place, its importance, the number of its contribution.
        groups: the group of each contribution.
        group_of: by place: the group.
    """

    places: NDArray[np.int64]
    values: Values
    source: NDArray[np.int64]
    groups: NDArray[np.int64]
    group_of: NDArray[np.int64]

    @classmethod
    def of(cls, found: Sequence[Contribution], group_of: NDArray[np.int64]) -> Collected:
        """Join them."""
        places = np.concatenate([np.empty(0, np.int64), *(item.places for item in found)])
        values = np.concatenate([np.empty(0), *(item.values for item in found)])
        source = np.repeat(np.arange(len(found)), [item.places.size for item in found])
        return cls(places, values, source, np.array([item.group for item in found], np.int64), group_of)

    def counts(self) -> NDArray[np.int64]:
        """By place: how many rows it has."""
        return np.bincount(self.places, minlength=self.group_of.size)


def _sum(rows: Collected) -> Values:
    return np.asarray(np.bincount(rows.places, rows.values, rows.group_of.size), np.float64)


def _mean(rows: Collected) -> Values:
    return np.asarray(_sum(rows) / np.maximum(rows.counts(), 1))


def _max(rows: Collected) -> Values:
    result = np.full(rows.group_of.size, -np.inf)
    np.maximum.at(result, rows.places, rows.values)
    return result


def _leader(rows: Collected) -> Values:
    """The mean over the rows of the first contribution that a unit has: of the parameter that comes first."""
    first = np.full(rows.group_of.size, rows.groups.size)
    np.minimum.at(first, rows.places, rows.source)
    chosen = rows.source == first[rows.places]
    return _mean(Collected(rows.places[chosen], rows.values[chosen], rows.source, rows.groups, rows.group_of))


def _tensors(rows: Collected) -> Values:
    tensors = np.bincount(rows.groups, minlength=int(rows.group_of.max(initial=-1)) + 1)
    return np.asarray(_sum(rows) / tensors[rows.group_of])


REDUCTIONS: Mapping[str, Callable[[Collected], Values]] = {
    "sum": _sum,
    "mean": _mean,
    "max": _max,
    "master": _leader,
    "first": _leader,
    "tensors": _tensors,
}
"""Over the rows of a unit: all of them, or those of the parameter that is defined
first ("master") or that runs first ("first"). "tensors" divides
the sum by the number of the group's parameters that count, as Torch-Pruning 1.6.1 does (importance.py, `_reduce`)."""


def rate_groups(
    graph: Graph,
    units: Units,
    groups: Sequence[ChannelGroup],
    weights: Mapping[str, Array],
    definition: Definition,
    evidence: Evidence,
) -> tuple[Values, ...]:
    """The importance of each unit, normalised.

    Args:
        graph: the traced model.
        units: its units.
        groups: those to rate.
        weights: canonical name -> array.
        definition: what importance is.
        evidence: gradients or activations, where the importance needs them.

    Returns:
        for each group float64, shape (units,), in the order of `group.units`.

    Raises:
        ModelError: a rated weight or gradient has entries that are not finite, or nothing rates a channel.
    """
    places = Places.of(units, groups)
    found: list[Contribution] = []
    master = definition.group_reduction == "master"
    known = np.zeros(places.group_of.size - 1, dtype=bool)
    for axis in _in_order(coupled_axes(graph, units, definition.rated), graph, master):
        if _has_evidence(axis, definition, evidence) and not (master and _all_rated(axis, places, known)):
            made = _contributions(axis, places, weights, definition, evidence)
            known[np.concatenate([np.empty(0, np.int64), *(item.places for item in made)])] = True
            found.extend(made)
    rows = Collected.of(found, places.group_of[:-1])
    _check_all_rated(rows, groups, definition)
    values = REDUCTIONS[definition.group_reduction](rows) ** (1.0 / definition.importance.root)
    if definition.normalisation == "total":
        return tuple(np.split(_over(values, values.sum()), places.ends[:-1]))
    return tuple(normalise(own, definition.normalisation) for own in np.split(values, places.ends[:-1]))


def _in_order(axes: Sequence[CoupledAxis], graph: Graph, master: bool) -> Sequence[CoupledAxis]:
    """As they run; for the master as they are defined, which is PaddleSlim's order."""
    if not master:
        return axes
    defined = {name: index for index, name in enumerate(graph.parameters)}
    return sorted(axes, key=lambda axis: defined[axis.parameter])


def _all_rated(axis: CoupledAxis, places: Places, known: NDArray[np.bool_]) -> bool:
    """Has each unit of the axis a master already?"""
    at = places.of_unit[axis.units]
    return bool(known[at[at >= 0]].all())


def unrated_groups(
    graph: Graph, units: Units, groups: Sequence[ChannelGroup], definition: Definition, evidence: Evidence
) -> frozenset[int]:
    """Indices of the groups with a channel that nothing rates: without a BatchNorm, or without a trained parameter."""
    if definition.rated in ("producers", "coupled") and definition.importance.needs == "weights":
        return frozenset()  # whatever makes a channel rates it
    places = Places.of(units, groups)
    rated = np.zeros(places.group_of[:-1].size, dtype=bool)
    for axis in coupled_axes(graph, units, definition.rated):
        if _has_evidence(axis, definition, evidence):
            for _, _, at in places.within(axis):
                rated[at[at >= 0]] = True
    return frozenset(places.group_of[:-1][~rated].tolist())


def _has_evidence(axis: CoupledAxis, definition: Definition, evidence: Evidence) -> bool:
    """A parameter that is not trained has no gradient, and is not rated by it."""
    needs = definition.importance.needs
    if needs == "activations":
        return axis.layer in evidence.activations
    needed = {"gradients": evidence.gradients, "squared_gradients": evidence.squared_gradients}.get(needs)
    return needed is None or axis.parameter in needed


def _contributions(
    axis: CoupledAxis, places: Places, weights: Mapping[str, Array], definition: Definition, evidence: Evidence
) -> list[Contribution]:
    result = []
    for group, only, at in places.within(axis):
        rows = rows_of(axis, weights, evidence, definition.seed, only)
        with np.errstate(all="ignore"):  # what is not finite is refused below
            values = np.asarray(definition.importance.score(rows, **definition.options), np.float64)
        if not np.isfinite(values).all() or not _reads_weights(definition):
            _check_finite(axis, rows, values, weights[axis.parameter])
        inside = at >= 0
        result.append(Contribution(group, at[inside], values[inside]))
    return result


def _reads_weights(definition: Definition) -> bool:
    """Does NaN or infinity in a weight show in its importance?"""
    return definition.importance.needs != "activations" and definition.name != "random"


def _check_finite(axis: CoupledAxis, rows: Rows, values: Values, parameter: Array) -> None:
    squared = rows.squared_gradient
    arrays = {"": parameter, "'s gradient": rows.gradient, "'s squared gradient": squared, "'s importance": values}
    for what, array in arrays.items():
        bad = 0 if array is None else int(array.size - np.isfinite(array).sum())
        if array is not None and bad:
            raise ModelError(
                f"layer '{axis.layer}': {bad} of {array.size} entries of its {axis.role}{what} are not finite"
            )


def _check_all_rated(rows: Collected, groups: Sequence[ChannelGroup], definition: Definition) -> None:
    unrated = np.flatnonzero(rows.counts() == 0)
    if not unrated.size:
        return
    group = groups[int(rows.group_of[unrated[0]])]
    count = int((rows.group_of[unrated] == rows.group_of[unrated[0]]).sum())
    raise ModelError(
        f"layer '{group.layers[0]}': importance '{definition.name}' finds nothing to rate for {count} of its group's "
        f"{group.units.size} channels (rated: {definition.rated}); ignore the layer, or take another importance"
    )


def normalise(values: Values, how: str) -> Values:
    """Make the importances of a group comparable with those of others.

    Source: Torch-Pruning 1.6.1 (importance.py, `_normalize`, `_lamp`) for all but "none".

    Args:
        values: shape (units,), at least one.
        how: "none"; "mean", "max", "sum" (divided by it; left alone where it is 0); "standard" (to 0..1, as
            (v - min) / (max - min + 1e-8)); "gaussian" ((v - mean) / (deviation + 1e-8), the deviation of a sample);
            "lamp" (each over the sum of those that are no smaller, equal ones in order of index).
    """
    if how == "none":
        return values
    if how == "standard":
        return np.asarray((values - values.min()) / (values.max() - values.min() + 1e-8))
    if how == "gaussian":
        deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
        return np.asarray((values - values.mean()) / (deviation + 1e-8))
    if how == "lamp":
        order = np.argsort(values, kind="stable")
        rest = np.cumsum(values[order][::-1])[::-1]
        result = np.zeros(values.size)
        result[order] = np.divide(values[order], rest, out=np.zeros(values.size), where=rest > 0)
        return result
    return _over(values, {"mean": values.mean(), "max": values.max(), "sum": values.sum()}[how])


def _over(values: Values, scale: np.float64) -> Values:
    return np.asarray(values / scale) if scale > 0 else values
