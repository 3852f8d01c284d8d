"""From a graph and weights to the channels that go."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from slimbridge.decisions import GroupChoice, PruneDecision, Skipped
from slimbridge.errors import ModelError, listed
from slimbridge.graph import Cost, Graph, Rules, Units, cost_of, cost_without, find_units
from slimbridge.plan.pruning import PruneStage, TargetSection
from slimbridge.ports import Array, Backend, Model
from slimbridge.prune.assembly import assemble, removed_units
from slimbridge.prune.coupled import structures
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.presets import Definition
from slimbridge.prune.rate import rate_groups, unrated_groups
from slimbridge.prune.scope import Scope, scope_of, units_before
from slimbridge.prune.select import Amount, choose
from slimbridge.prune.target import ROUNDS, search_ratio


@dataclass(frozen=True)
class Basis:
    """What a decision rests on beside the graph and the weights.

    Attributes:
        evidence: gradients and activations, for importances that need them.
        initial: parameter -> shape in the model that `relative_to` names.
        initial_cost: {"parameters", "macs", "latency"} of that model; None takes the present one.
        latency: milliseconds of a model, for a latency target; measured by whoever gives it.
        ratios: first layer of a group -> its ratio, from sensitivity curves; a group that is not named is left alone.
        seed: of importances that draw.
    """

    evidence: Evidence = field(default_factory=Evidence)
    initial: Mapping[str, Sequence[int]] = field(default_factory=dict)
    initial_cost: Mapping[str, float] | None = None
    latency: Callable[[Model], float] | None = None
    ratios: Mapping[str, float] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Candidates:
    """Rated groups of one graph, from which decisions of any ratio follow."""

    graph: Graph
    units: Units
    scope: Scope
    definition: Definition
    values: tuple[NDArray[np.float64], ...]
    before: tuple[int, ...]
    structures: tuple[Hashable, ...] = ()

    def without(self, bad: Mapping[int, str]) -> Candidates:
        """Less the groups that make the model wrong."""
        scope = self.scope
        for index, why in sorted(bad.items(), reverse=True):
            scope = scope.without({index}, f"the pruned model is wrong with its channels removed: {why}")
        stays = [index for index in range(len(self.values)) if index not in bad]
        return replace(
            self,
            scope=scope,
            values=tuple(self.values[i] for i in stays),
            before=tuple(self.before[i] for i in stays),
            structures=tuple(self.structures[i] for i in stays) if self.structures else (),
        )

    def choose(self, amounts: Sequence[Amount]) -> tuple[NDArray[np.int64], ...]:
        """Positions that go, of each group."""
        return choose(self.scope.groups, self.values, amounts, self.definition, self.structures)

    def cost_left(self, chosen: Sequence[NDArray[np.int64]]) -> Cost:
        """The cost without what was chosen."""
        return cost_without(self.graph, self.units, removed_units(self.scope.groups, chosen))


class Decider:
    """Makes the decisions of one prune stage, in neutral code."""

    def __init__(self, stage: PruneStage, basis: Basis) -> None:
        self.stage, self.basis = stage, basis
        self.definition = Definition.of(stage, basis.seed)

    def candidates(self, graph: Graph, weights: Mapping[str, Array], rules: Rules) -> Candidates:
        """Find and rate the channel groups that the stage may prune.

        Raises:
            ModelError: a pattern matches no layer, a weight is not finite, or no layer's channels may go.
        """
        units = find_units(graph, rules)
        scope = scope_of(self.stage, units)
        if not scope.groups:
            raise ModelError(_nothing_free(scope.skipped))
        missing = unrated_groups(graph, units, scope.groups, self.definition, self.basis.evidence)
        if len(missing) < len(scope.groups):
            scope = scope.without(missing, f"importance '{self.definition.name}' finds nothing to rate its channels by")
        values = rate_groups(graph, units, scope.groups, weights, self.definition, self.basis.evidence)
        shapes = self.basis.initial if self.stage.relative_to != "current" else {}
        before = tuple(units_before(units, group, shapes) for group in scope.groups)
        alike = structures(graph, units, scope.groups) if self.stage.selection == "isomorphic" else ()
        return Candidates(graph, units, scope, self.definition, values, before, alike)

    def decide(self, graph: Graph, weights: Mapping[str, Array], rules: Rules) -> PruneDecision:
        """Choose channels.

        Args:
            graph: the traced model.
            weights: canonical name -> array.
            rules: see `slimbridge.graph.find_units`.

        Raises:
            ModelError: as `candidates`; or no channel goes.
        """
        return self.decided(self.candidates(graph, weights, rules))

    def decided(self, found: Candidates) -> PruneDecision:
        """The decision among some candidates; ModelError where no channel goes."""
        searched = self._searched(found) if self.stage.target is not None and self.basis.ratios is None else None
        return self._decision(found, searched)

    def _decision(self, found: Candidates, searched: float | None) -> PruneDecision:
        """ModelError where no channel goes."""
        amounts = self.amounts(found, searched)
        chosen = found.choose(amounts)
        if not any(positions.size for positions in chosen):
            raise ModelError(_nothing_goes(found, amounts, self.stage.target))
        return decision_of(found, chosen, searched or self.stage.pruning_ratio or 0.0)

    def amounts(self, found: Candidates, searched: float | None) -> tuple[Amount, ...]:
        """How much of each group goes: its own ratio, that of its sensitivity curve, or the searched or stage's one."""
        curves = self.basis.ratios
        amounts = []
        for group, own, before in zip(found.scope.groups, found.scope.ratios, found.before, strict=True):
            ratio = own if own is not None else searched if searched is not None else self.stage.pruning_ratio or 0.0
            if curves is not None and own is None:
                ratio = curves.get(group.layers[0], 0.0)
            amounts.append(Amount(ratio, before, own is not None))
        return tuple(amounts)

    def _searched(self, found: Candidates) -> float:
        """The ratio that reaches the stage's target of parameters or MACs."""
        target = self.stage.target
        assert target is not None
        whole = self._known_before(target.of) or float(getattr(cost_of(found.graph), target.of))

        def removed_by(ratio: float) -> float:
            left = found.cost_left(found.choose(self.amounts(found, ratio)))
            return 1.0 - float(getattr(left, target.of)) / whole

        return search_ratio(removed_by, target.remove, ROUNDS[target.of]).ratio

    def at_latency(self, backend: Backend, model: Model, graph: Graph, rules: Rules) -> PruneDecision:
        """As `decide`, for a target of measured latency; the model is left as it is."""
        target, measure = self.stage.target, self.basis.latency
        if target is None or measure is None:
            raise ModelError("a latency target needs a machine to measure on: run the plan, it does")
        found = self.candidates(graph, backend.read(model), rules)
        known = self._known_before("latency")

        def removed_by(ratio: float) -> float:
            chosen = found.choose(self.amounts(found, ratio))
            if not any(positions.size for positions in chosen):
                return 0.0  # the same model: its times would differ by noise alone
            decision = decision_of(found, chosen, ratio)
            pruned = backend.remove_channels(backend.clone(model), decision)
            whole = known or measure(model)  # side by side, so that a busy machine slows both
            return 1.0 - measure(pruned) / whole

        ratio = search_ratio(removed_by, target.remove, ROUNDS["latency"]).ratio
        return self._decision(found, ratio)

    def _known_before(self, of: str) -> float | None:
        """The cost that a share is taken of, where it is not that of the present model."""
        known = self.basis.initial_cost if self.stage.relative_to != "current" else None
        return known[of] if known is not None else None


def decision_of(found: Candidates, chosen: Sequence[NDArray[np.int64]], ratio: float) -> PruneDecision:
    """The decision to remove the units at some positions of each group.

    Args:
        found: the rated groups.
        chosen: positions of each group, ascending.
        ratio: what the decision records as the share asked for.
    """
    groups = found.scope.groups
    choices = tuple(
        GroupChoice(layers=group.layers, channels=group.units.size, removed=tuple(positions.tolist()))
        for group, positions in zip(groups, chosen, strict=True)
    )
    removed = removed_units(groups, chosen)
    return assemble(found.graph, found.units, removed, choices, found.definition.name, ratio, found.scope.skipped)


def _nothing_goes(found: Candidates, amounts: Sequence[Amount], target: TargetSection | None) -> str:
    widest = max(group.units.size for group in found.scope.groups)
    largest = max(amount.ratio for amount in amounts)
    asked = f"pruning_ratio {largest:g}" if target is None else f"the ratio nearest to target.remove {target.remove:g}"
    return (
        f"{asked} removes no channel: the widest of {len(found.scope.groups)} channel groups has "
        f"{widest} channels (round_to, min_channels and max_ratio count too); ask for more, or for fewer steps"
    )


def _nothing_free(skipped: Sequence[Skipped]) -> str:
    why = listed((f"'{item.layer}' ({item.reason})" for item in skipped), limit=4)
    return f"no channel of any layer may be removed; layers found: {len(skipped)}: {why}"
