"""Structured pruning: decide which channels go, remove them, and prove that it was right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slimbridge.decisions import PruneDecision
from slimbridge.errors import ModelError
from slimbridge.graph import Graph, Rules, find_units
from slimbridge.plan.pruning import PruneStage
from slimbridge.ports import Array, Backend, Model
from slimbridge.prune.decide import Basis, Candidates, Decider, decision_of
from slimbridge.prune.isolate import unseen_layers, wrong_groups
from slimbridge.prune.native import native_decision
from slimbridge.prune.select import Amount
from slimbridge.prune.verify import what_is_wrong

LADDER = (Rules(), Rules(freeze_attention=True), Rules(freeze_attention=True, freeze_reshapes=True))
"""Widths in a model's code show only when the pruned model runs; each rung holds more of the channels."""
FEW = 0.75
"""When the last rung lets less than this share of the groups go, those that make the model wrong are looked for."""


@dataclass(frozen=True)
class Trial:
    """A model that decisions are tried on.

    Attributes:
        backend, model: the model is left as it is.
        example: inputs of one forward pass.
        graph: the model's trace on it.
    """

    backend: Backend
    model: Model
    example: Sequence[Array]
    graph: Graph

    def prove(self, decision: PruneDecision) -> tuple[Model, str | None]:
        """A pruned copy, and what is wrong with it."""
        pruned = self.backend.clone(self.model)
        try:
            pruned = self.backend.remove_channels(pruned, decision)
        except ModelError as error:
            return pruned, str(error)
        return pruned, what_is_wrong(self.backend, self.model, pruned, decision, self.example)

    def complete(self, decision: PruneDecision) -> PruneDecision:
        """With the layers that the graph does not show among those left alone."""
        known = {item.layer for item in decision.skipped}
        unseen = unseen_layers(self.backend.layers(self.model), self.graph)
        more = {item.layer: item for item in unseen if item.layer not in known}
        return decision.model_copy(update={"skipped": (*decision.skipped, *more.values())}) if more else decision


class Pruner:
    """Carries out one prune stage. `decide` is neutral; `apply` asks a backend to remove what was decided."""

    def __init__(self, stage: PruneStage, basis: Basis | None = None) -> None:
        self.stage, self.basis = stage, basis or Basis()
        self.decider = Decider(stage, self.basis)

    def candidates(self, graph: Graph, weights: Mapping[str, Array], rules: Rules | None = None) -> Candidates:
        """The rated channel groups; see `Decider.candidates`. The stage's first rules are the default."""
        return self.decider.candidates(graph, weights, rules or self._ladder()[0])

    def decide(self, graph: Graph, weights: Mapping[str, Array], rules: Rules | None = None) -> PruneDecision:
        """Choose channels; see `Decider.decide`. The stage's first rules are the default."""
        return self.decider.decide(graph, weights, rules or self._ladder()[0])

    def apply(self, backend: Backend, model: Model, decision: PruneDecision) -> Model:
        """Remove what was decided from the model, in place."""
        return backend.remove_channels(model, decision)

    def prune(self, backend: Backend, model: Model, example: Sequence[Array]) -> tuple[Model, PruneDecision]:
        """Trace, decide, apply to a copy, and prove on the example that it equals zeroing the channels.

        A model that writes widths into its code cannot be told from one that computes them until it runs: when the
        proof fails, more channels are frozen and the decision is made anew; where that would hold too many, the groups
        that make the model wrong are looked for one by one.

        Args:
            backend: the model's backend.
            model: left as it is.
            example: inputs of one forward pass.

        Returns:
            the pruned copy and the decision.

        Raises:
            ModelError: nothing can be pruned, or the pruned model is wrong in every way.
        """
        trial = Trial(backend, model, example, backend.trace(model, example))
        rungs = self._ladder() if self.stage.layer_norm == "keep" else self._right_without_norms(trial)
        tried: list[PruneDecision] = []
        wrong: str | None = None
        for rules in rungs:
            try:
                decision = self._decide_for(trial, rules)
            except ModelError as error:
                if wrong is None:
                    raise
                refusal = f"{error}; with more channels free the pruned model is wrong: {wrong}"
                return self._isolated(trial, rungs, refusal)
            if decision in tried:
                continue
            tried.append(decision)
            pruned, found = trial.prove(decision)
            if found is None:
                known = pruned, trial.complete(decision)
                few = _groups_pruned(decision) < FEW * _groups_pruned(tried[0])
                return self._best(trial, rungs, known) if few else known
            wrong = found
        return self._isolated(trial, rungs, f"no removal is right, whatever is held back: {wrong}")

    def _best(
        self, trial: Trial, rungs: Sequence[Rules], known: tuple[Model, PruneDecision]
    ) -> tuple[Model, PruneDecision]:
        """What isolating the wrong groups gives, or what is known already where that lets more go."""
        try:
            other = self._isolated(trial, rungs, "")
        except ModelError:
            other = known
        return max(known, other, key=lambda item: _groups_pruned(item[1]))

    def _isolated(self, trial: Trial, rungs: Sequence[Rules], refusal: str) -> tuple[Model, PruneDecision]:
        """Leave out the groups that make the model wrong; ModelError (the refusal) when none is left, or after long."""
        if self.stage.engine == "native":
            raise ModelError(refusal)
        decider = self.decider
        found = decider.candidates(trial.graph, trial.backend.read(trial.model), rungs[min(1, len(rungs) - 1)])
        plain = decider.amounts(found, self.stage.pruning_ratio or 0.5)

        def wrong_with(groups: Sequence[int]) -> str | None:
            amounts = [amount if i in groups else Amount(0.0, amount.before) for i, amount in enumerate(plain)]
            return trial.prove(decision_of(found, found.choose(amounts), 0.0))[1]

        bad = wrong_groups(len(plain), wrong_with)
        if bad is None or len(bad) == len(plain):
            raise ModelError(refusal)
        decision = decider.decided(found.without(bad))
        pruned, wrong = trial.prove(decision)
        if wrong is not None:
            raise ModelError(refusal or wrong)
        return pruned, trial.complete(decision)

    def _right_without_norms(self, trial: Trial) -> tuple[Rules, ...]:
        """The rules for channels that a LayerNorm normalises, whose removal can be proved by nothing.

        Whatever else their rules let go is proved with those channels kept; the first rung that is right then serves.
        """
        keep = Pruner(self.stage.model_copy(update={"layer_norm": "keep"}), self.basis)
        for rules in keep._ladder():
            try:
                if trial.prove(keep._decide_for(trial, rules))[1] is None:
                    break
            except ModelError:
                continue  # without those channels nothing is left to go
        return (Rules(rules.freeze_attention, rules.freeze_reshapes, layer_norms=True),)

    def _decide_for(self, trial: Trial, rules: Rules) -> PruneDecision:
        backend, model, graph = trial.backend, trial.model, trial.graph
        if self.stage.engine == "native":
            return native_decision(self.stage, backend, model, trial.example, graph, find_units(graph, rules))
        if self.stage.target is not None and self.stage.target.of == "latency":
            return self.decider.at_latency(backend, model, graph, rules)
        return self.decider.decide(graph, backend.read(model), rules)

    def _ladder(self) -> tuple[Rules, ...]:
        if self.stage.granularity == "heads":
            return (Rules(heads=True),)
        norms = self.stage.layer_norm == "prune"
        return tuple(Rules(rules.freeze_attention, rules.freeze_reshapes, layer_norms=norms) for rules in LADDER)


def _groups_pruned(decision: PruneDecision) -> int:
    """How many channel groups lose any channel."""
    return sum(bool(group.removed) for group in decision.groups)
