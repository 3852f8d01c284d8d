"""Masks over single weights: decide which entries are zero, carry masks through a run, and tell what they save."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from slimbridge.decisions import Decision, Mask, MaskDecision, PruneDecision, Skipped
from slimbridge.errors import ModelError, RunError, SlimbridgeError, listed, nearest
from slimbridge.graph import OUTPUT, Graph
from slimbridge.plan.pruning import SparsifyStage
from slimbridge.plan.registries import ENTRY_IMPORTANCES, Rows
from slimbridge.ports import Array, Layer, as_float64
from slimbridge.prune.candidates import Candidate, find_candidates
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.isolate import UNUSED, unseen_layers
from slimbridge.prune.patterns import Bools, mask_of, masks_of
from slimbridge.prune.scope import matching

NO_MASKS: Mapping[str, Bools] = MappingProxyType({})
WHAT_MASKS_SAVE = (
    "zeros alone save nothing: dense kernels compute them too, and on CPU runtimes they change neither latency nor "
    "size; what saves: removing channels (kind: prune), 2:4 kernels on NVIDIA GPUs, sparse formats below about 15 % "
    "density"
)


class Sparsifier:
    """Decides the masks of one sparsify stage, in neutral code.

    Args:
        stage: what the plan says.
        seed: of importances that draw.

    Raises:
        SlimbridgeError: the importance does not have an option that the plan gives.
    """

    def __init__(self, stage: SparsifyStage, seed: int) -> None:
        self.stage = stage
        self.seed = seed
        self.importance = ENTRY_IMPORTANCES.get(stage.importance)
        allowed = list(inspect.signature(self.importance.score).parameters)[1:]
        for name in stage.importance_options:
            if name not in allowed:
                raise SlimbridgeError(
                    f"entry importance '{stage.importance}' has no option '{name}'{nearest(name, allowed)}; "
                    f"allowed: {listed(allowed)}"
                )

    def decide(
        self,
        layers: Sequence[Layer],
        graph: Graph | None,
        weights: Mapping[str, Array],
        evidence: Evidence,
        sparsity: float | None = None,
        held: Mapping[str, Bools] = NO_MASKS,
    ) -> MaskDecision:
        """Choose the entries that are zero from now on.

        Args:
            layers: of the model; convolutions and linear layers are candidates.
            graph: the traced model, which tells the groups of convolutions; None: transposed convolutions take the
                pattern "unstructured" only, others are not affected.
            weights: canonical name -> array.
            evidence: what the importance needs beside them.
            sparsity: in place of the stage's, for rounds that lead up to it.
            held: masks in force; what they zero stays zero and counts.

        Raises:
            ModelError: a pattern matches no layer, a weight or an importance is not finite, evidence is missing, or
                nothing changes.
        """
        if graph is None and "grouped" in self.stage.ignored_kinds:
            raise ModelError("ignored_kinds: 'grouped' needs a model that can be traced; its groups are not known")
        candidates = find_candidates(layers, graph)
        skipped = tuple(self._skipped(candidates, weights, graph))
        skipped = (*skipped, *_not_candidates(candidates, layers, graph))
        masks = self.masks(layers, graph, weights, evidence, sparsity, held)
        if not masks:
            why = listed((f"'{item.layer}' ({item.reason})" for item in skipped), limit=4)
            raise ModelError(f"no layer may be masked; layers found: {len(skipped)}: {why}")
        self._check_change(masks, held)
        return MaskDecision(
            importance=self.stage.importance,
            pattern=self.pattern,
            sparsity=self._asked(candidates, masks, sparsity),
            masks={name: Mask.of(mask) for name, mask in masks.items()},
            skipped=skipped,
        )

    def masks(
        self,
        layers: Sequence[Layer],
        graph: Graph | None,
        weights: Mapping[str, Array],
        evidence: Evidence,
        sparsity: float | None = None,
        held: Mapping[str, Bools] = NO_MASKS,
    ) -> dict[str, Bools]:
        """The masks by weight name, as `decide` makes them; all True where the sparsity is too small."""
        outputs = self._outputs(graph)
        chosen = [c for c in find_candidates(layers, graph) if self._why_dense(c, weights, outputs) is None]
        scores, before, shares = {}, {}, {}
        for c in chosen:
            scores[c.weight] = self._scores(c, weights, evidence)
            before[c.weight] = c.rows(held[c.weight]) if c.weight in held else None
            shares[c.weight] = self._share(c, sparsity)
        together: list[str] = []
        if self.stage.selection == "global" and self.stage.pattern != "n_m":
            together = [c.weight for c in chosen if self._own_share(c) is None]
        found: dict[str, Bools] = {}
        if together:
            parts = [scores[name] for name in together], [before[name] for name in together]
            block, share = self.stage.block, shares[together[0]]
            found.update(zip(together, masks_of(parts[0], self.stage.pattern, share, block, parts[1]), strict=True))
        for c in chosen:
            if c.weight not in found:
                options = (self.stage.pattern, shares[c.weight], self.stage.block, self.stage.n_m)
                found[c.weight] = mask_of(scores[c.weight], *options, before[c.weight])
        return {c.weight: c.canonical(found[c.weight], weights[c.weight].shape) for c in chosen}

    @property
    def pattern(self) -> str:
        """As decisions write it: "unstructured", "block MxN", "N:M" or "filters"."""
        stage = self.stage
        names = {"block": "block {}x{}".format(*stage.block), "n_m": "{}:{}".format(*stage.n_m)}
        return names.get(stage.pattern, stage.pattern)

    def _own_share(self, candidate: Candidate) -> float | None:
        """What `layer_sparsity` says of it; of several patterns that match, the last counts."""
        shares = [share for pattern, share in self.stage.layer_sparsity.items() if candidate.matches(pattern)]
        return shares[-1] if shares else None

    def _share(self, candidate: Candidate, sparsity: float | None) -> float:
        if self.stage.pattern == "n_m":
            return 1 - self.stage.n_m[0] / self.stage.n_m[1]
        own = self._own_share(candidate)
        common = self.stage.sparsity if sparsity is None else sparsity
        share = common if own is None else own
        return share or 0.0

    def _asked(self, candidates: Sequence[Candidate], masks: Mapping[str, Bools], sparsity: float | None) -> float:
        """The stage's sparsity; where only layers have one, the mean over their weights."""
        if self.stage.pattern == "n_m" or sparsity is not None or self.stage.sparsity is not None:
            return self._share(Candidate("", (), "", None), sparsity)
        chosen = [c for c in candidates if c.weight in masks]
        zeros = sum(self._share(c, None) * masks[c.weight].size for c in chosen)
        return float(zeros / sum(masks[c.weight].size for c in chosen))

    def _scores(self, candidate: Candidate, weights: Mapping[str, Array], evidence: Evidence) -> Array:
        name, weight = candidate.weight, weights[candidate.weight]
        bad = int(weight.size - np.isfinite(weight).sum())
        if bad:
            raise ModelError(f"layer '{candidate.paths[0]}': {bad} of {weight.size} entries of its weight not finite")
        extra: dict[str, Any] = {}
        needs = self.importance.needs
        if needs in ("gradients", "squared_gradients"):
            found = getattr(evidence, needs).get(name)
            if found is None:
                raise ModelError(f"importance '{self.stage.importance}' needs {needs}; '{name}' has none")
            extra[needs[:-1]] = candidate.rows(found)
        kind = "linear" if candidate.kind == "linear" else "conv"
        rows = Rows(name, "weight", kind, "out", candidate.rows(weight), seed=self.seed, **extra)
        scores = as_float64(self.importance.score(rows, **self.stage.importance_options))
        if scores.shape != rows.weight.shape or not np.isfinite(scores).all():
            what = f"shape {scores.shape}, expected {rows.weight.shape}" if scores.shape != rows.weight.shape else "NaN"
            raise ModelError(f"importance '{self.stage.importance}' of layer '{candidate.paths[0]}': found {what}")
        return scores

    def _skipped(
        self, candidates: Sequence[Candidate], weights: Mapping[str, Array], graph: Graph | None
    ) -> Iterator[Skipped]:
        paths = [path for candidate in candidates for path in candidate.paths]
        for key in ("ignored_layers", "layer_sparsity"):
            matching(getattr(self.stage, key), paths, key)
        outputs = self._outputs(graph)
        for candidate in candidates:
            reason = self._why_dense(candidate, weights, outputs)
            if reason is not None:
                yield from (Skipped(layer=path, reason=reason) for path in candidate.paths)

    def _outputs(self, graph: Graph | None) -> set[str]:
        """Weights whose rows must not be masked whole, where rows are."""
        return _of_outputs(graph) if self.stage.pattern == "filters" and graph is not None else set()

    def _why_dense(self, candidate: Candidate, weights: Mapping[str, Array], outputs: Collection[str]) -> str | None:
        stage = self.stage
        if any(candidate.matches(pattern) for pattern in stage.ignored_layers):
            return "ignored_layers names it"
        if candidate.kind in stage.ignored_kinds:
            return f"ignored_kinds names '{candidate.kind}'"
        if stage.pattern != "n_m" and stage.sparsity is None and self._own_share(candidate) is None:
            return "layer_sparsity does not name it"
        if stage.pattern == "unstructured":
            return None
        if candidate.weight in outputs:
            return OUTPUT
        if candidate.kind == "transposed" and candidate.groups is None:
            return "its groups are not known without a trace"
        inputs = candidate.rows(weights[candidate.weight]).shape[1]
        if stage.pattern == "n_m" and inputs % stage.n_m[1]:
            return f"its {inputs} inputs (of a group) are no multiple of {stage.n_m[1]}"
        return None

    def _check_change(self, masks: Mapping[str, Bools], held: Mapping[str, Bools]) -> None:
        before = {name: held.get(name, np.True_) for name in masks}
        if not any(np.any(before[name] & ~mask) for name, mask in masks.items()):
            total = sum(mask.size for mask in masks.values())
            zero = total - sum(int(mask.sum()) for mask in masks.values())
            raise ModelError(
                f"0 of {len(masks)} layers changed: pattern {self.pattern}, importance {self.stage.importance}; "
                f"{zero} of their {total} weights are masked, as before: ask for a higher sparsity, or for fewer steps"
            )


def _of_outputs(graph: Graph) -> set[str]:
    """Weights of the layers whose channels are outputs of the model: a class must not be masked away."""
    makers = {tensor: node for node in graph.nodes for tensor in node.outputs}
    waiting, seen, found = list(graph.outputs), set(), set()
    while waiting:
        tensor = waiting.pop()
        node = makers.get(tensor)
        if tensor in seen or node is None:
            continue
        seen.add(tensor)
        if node.kind in ("conv", "linear"):
            found.add(node.params["weight"])
        else:
            waiting.extend(node.inputs)
    return found


def _not_candidates(candidates: Sequence[Candidate], layers: Sequence[Layer], graph: Graph | None) -> Iterator[Skipped]:
    """Layers that multiply by a weight which is none of the candidates': computed, or a part of a larger layer."""
    known = {candidate.weight for candidate in candidates}
    if graph is None:
        return
    for node in graph.layer_nodes():
        if node.params["weight"] not in known:
            yield Skipped(
                layer=node.name, reason=f"its weight '{node.params['weight']}' is a parameter of its own kind"
            )
    for item in unseen_layers(layers, graph):
        if item.reason != UNUSED:
            yield item


def masked(weights: Mapping[str, Array], masks: Mapping[str, Bools]) -> dict[str, Array]:
    """The weights with every masked entry 0; arrays without a mask are those given.

    Raises:
        ModelError: a mask's parameter does not exist or has another shape.
    """
    result = dict(weights)
    for name, mask in masks.items():
        if name not in weights:
            raise ModelError(f"mask of '{name}': the model has no such parameter{nearest(name, weights)}")
        if weights[name].shape != mask.shape:
            raise ModelError(f"mask of '{name}': it has shape {mask.shape}, the parameter {weights[name].shape}")
        result[name] = np.where(mask, weights[name], np.zeros((), weights[name].dtype))
    return result


def masks_in_force(decisions: Iterable[Decision]) -> dict[str, Bools]:
    """The masks after a run's decisions, in their order: new masks join the old ones, removed channels leave them.

    Returns:
        parameter -> True = stays, for parameters with at least one zero entry by mask.

    Raises:
        RunError: a decision does not fit the masks before it.
    """
    force: dict[str, Bools] = {}
    for decision in decisions:
        if isinstance(decision, MaskDecision):
            for name, mask in decision.masks.items():
                _check_shape(name, force.get(name), mask.shape)
                force[name] = mask.array() & force.get(name, np.True_)
        elif isinstance(decision, PruneDecision):
            for name in force.keys() & decision.kept.keys():
                _check_shape(name, force[name], decision.sizes[name])
                for axis, kept in decision.kept[name].items():
                    force[name] = np.take(force[name], kept, axis=axis)
    return {name: mask for name, mask in force.items() if not mask.all()}


def _check_shape(name: str, mask: Bools | None, shape: tuple[int, ...]) -> None:
    if mask is not None and mask.shape != tuple(shape):
        raise RunError(f"the decisions do not fit: '{name}' is masked with shape {mask.shape}, then has {shape}")


def notes(decision: MaskDecision, weights: Mapping[str, Array]) -> tuple[str, ...]:
    """Lines for the report: how many zeros there are now, which layers lost all, and what zeros save.

    Args:
        decision: the masks.
        weights: of the model, canonical name -> array, masked.
    """
    masks = {name: mask.array() for name, mask in decision.masks.items()}
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    total = sum(weights[name].size for name in masks)
    changed = sum(not mask.all() for mask in masks.values())
    lines = [f"zeros: {zeros} of {total} weights ({100 * zeros / max(total, 1):.1f} %) in {changed} layers"]
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        lines.append(f"no weight is left in: {listed(empty, 6)}")
    return (*lines, WHAT_MASKS_SAVE)
