"""Structured pruning: decide which channels go, then remove them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from slimbridge.decisions import GroupChoice, PruneDecision, Skipped
from slimbridge.errors import ModelError, listed, nearest
from slimbridge.graph import ChannelGroup, Graph, Units, find_units
from slimbridge.plan.registries import IMPORTANCES
from slimbridge.plan.schema import PruneStage
from slimbridge.ports import Array, Backend, Model
from slimbridge.prune.select import last_of_each_layer, least_important, remove_count, unit_importance
from slimbridge.prune.verify import what_is_wrong


class Pruner:
    """Carries out one prune stage. `decide` is neutral; `apply` asks a backend to remove what was decided."""

    def __init__(self, stage: PruneStage) -> None:
        self.stage = stage

    def decide(self, graph: Graph, weights: Mapping[str, Array], freeze_reshapes: bool = False) -> PruneDecision:
        """Choose channels.

        Args:
            graph: the traced model.
            weights: canonical name -> array.
            freeze_reshapes: see `slimbridge.graph.find_units`.

        Raises:
            ModelError: a pattern matches no layer, a weight is not finite, or no channel of any layer may go.
        """
        units = find_units(graph, freeze_reshapes)
        groups = units.groups()
        ignored = self._ignored(units)
        importance = IMPORTANCES.get(self.stage.importance)
        removed: set[int] = set()
        choices = []
        for group in groups:
            if ignored.intersection(group.layers):
                continue
            count = remove_count(group.units.size, self.stage.pruning_ratio)
            values = unit_importance(group, weights, importance)
            chosen = least_important(values, count, last_of_each_layer(group, values))
            removed.update(group.units[chosen].tolist())
            choices.append(GroupChoice(layers=group.layers, channels=group.units.size, removed=tuple(chosen.tolist())))
        skipped = tuple(self._skipped(units, groups, ignored))
        if not removed:
            raise ModelError(self._nothing(choices, skipped))
        kept = units.kept(removed)
        return PruneDecision(
            importance=self.stage.importance,
            pruning_ratio=self.stage.pruning_ratio,
            groups=tuple(choices),
            kept=kept,
            sizes={name: tuple(graph.parameters[name]) for name in kept},
            skipped=skipped,
        )

    def apply(self, backend: Backend, model: Model, decision: PruneDecision) -> Model:
        """Remove what was decided from the model, in place."""
        return backend.remove_channels(model, decision)

    def prune(self, backend: Backend, model: Model, example: Sequence[Array]) -> tuple[Model, PruneDecision]:
        """Trace, decide, apply to a copy, and prove on the example that it equals zeroing the channels.

        A model that writes widths into its code cannot be told from one that computes them until it runs: when the
        proof fails, the widths at reshapes and splits are frozen and the decision is made anew.

        Args:
            backend: the model's backend.
            model: left as it is.
            example: inputs of one forward pass.

        Returns:
            the pruned copy and the decision.

        Raises:
            ModelError: nothing can be pruned, or the pruned model is wrong in either way.
        """
        graph, weights = backend.trace(model, example), backend.read(model)
        for freeze_reshapes in (False, True):
            decision = self.decide(graph, weights, freeze_reshapes)
            pruned = self.apply(backend, backend.clone(model), decision)
            wrong = what_is_wrong(backend, model, pruned, decision, example)
            if wrong is None:
                return pruned, decision
        raise ModelError(f"the pruned model is wrong, also with channels at reshapes and splits kept: {wrong}")

    def _ignored(self, units: Units) -> set[str]:
        layers = [producer.layer for producer in units.producers]
        ignored: set[str] = set()
        for pattern in self.stage.ignored_layers:
            matched = [layer for layer in layers if fnmatchcase(layer, pattern)]
            if not matched:
                raise ModelError(
                    f"ignored_layers: '{pattern}' matches none of the {len(layers)} convolution and linear layers"
                    f"{nearest(pattern, layers)}; they are: {listed(layers)}"
                )
            ignored.update(matched)
        return ignored

    def _skipped(self, units: Units, groups: Sequence[ChannelGroup], ignored: set[str]) -> Iterator[Skipped]:
        shared = {layer: group for group in groups for layer in group.layers}
        for producer in units.producers:
            reason = units.why_frozen(producer)
            if reason is None:
                reason = self._why_ignored(producer.layer, shared.get(producer.layer), ignored)
            if reason is not None:
                yield Skipped(layer=producer.layer, reason=reason)

    def _why_ignored(self, layer: str, group: ChannelGroup | None, ignored: set[str]) -> str | None:
        if layer in ignored:
            return "ignored_layers names it"
        partners = sorted(ignored.intersection(group.layers)) if group else []
        return f"its channels are tied to '{partners[0]}', which ignored_layers names" if partners else None

    def _nothing(self, choices: Sequence[GroupChoice], skipped: Sequence[Skipped]) -> str:
        if choices:
            widest = max(choice.channels for choice in choices)
            return (
                f"pruning_ratio {self.stage.pruning_ratio} removes no channel: the widest of {len(choices)} "
                f"channel groups has {widest} channels"
            )
        why = listed((f"'{item.layer}' ({item.reason})" for item in skipped), limit=4)
        return f"no channel of any layer may be removed; layers found: {len(skipped)}: {why}"
