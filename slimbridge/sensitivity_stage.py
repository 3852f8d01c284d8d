"""The ratios of a prune stage from sensitivity curves, which are measured on the run's own metric."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimbridge.curves import Sensitivity
from slimbridge.graph import Graph, cost_of
from slimbridge.plan import PruneStage
from slimbridge.ports import Array, Model
from slimbridge.prune import Pruner, zeroed
from slimbridge.prune.decide import Basis, Candidates, decision_of
from slimbridge.prune.select import Amount
from slimbridge.prune.sensitivity import SensitivityJob, measure, ratios_for_loss, ratios_for_target
from slimbridge.stages import Scene
from slimbridge.tasks import Split, batches
from slimbridge.tasks.data import Batch
from slimbridge.train import evaluate
from slimbridge.weights import digest_of


def sensitivity_ratios(
    scene: Scene, name: str, stage: PruneStage, model: Model, graph: Graph, basis: Basis
) -> tuple[Sensitivity, Mapping[str, float]]:
    """The curves, and the ratio of each group (by its first layer) that they lead to.

    Raises:
        ModelError: the target cannot be reached with the ratios that were tried.
        RunError: curves of something else lie in the run's folder.
    """
    assert stage.sensitivity is not None
    weights = scene.backend.read(model)
    plain = stage.model_copy(update={"sensitivity": None, "target": None, "pruning_ratio": 0.5, "finetune": None})
    found = Pruner(plain, basis).candidates(graph, weights)
    curves = measure(_job(scene, name, stage, plain, model, weights, found), scene.file(f"sensitivity-{name}.json"))
    if stage.sensitivity.max_loss is not None:
        return curves, ratios_for_loss(curves, stage.sensitivity.max_loss)
    assert stage.target is not None
    of = stage.target.of
    known = basis.initial_cost if stage.relative_to != "current" else None
    whole = known[of] if known is not None else float(getattr(cost_of(graph), of))

    def share(ratios: Mapping[str, float]) -> float:
        left = found.cost_left(found.choose(_amounts(found, ratios)))
        return 1.0 - float(getattr(left, of)) / whole

    return curves, ratios_for_target(curves, share, stage.target.remove)


def _amounts(found: Candidates, ratios: Mapping[str, float]) -> list[Amount]:
    pairs = zip(found.scope.groups, found.before, strict=True)
    return [Amount(ratios.get(group.layers[0], 0.0), before) for group, before in pairs]


def _job(
    scene: Scene,
    name: str,
    stage: PruneStage,
    plain: PruneStage,
    model: Model,
    weights: Mapping[str, Array],
    found: Candidates,
) -> SensitivityJob:
    assert stage.sensitivity is not None
    backend, groups = scene.backend, found.scope.groups
    test = _first(scene.data.test, stage.sensitivity.samples)

    def choose(group: int, ratio: float) -> Sequence[int]:
        positions = found.choose(_amounts(found, {groups[group].layers[0]: ratio}))[group]
        return [int(position) for position in positions]

    def metric_of(group: int, ratio: float) -> float:
        chosen = [np.empty(0, np.int64) for _ in groups]
        chosen[group] = np.asarray(choose(group, ratio), np.int64)
        silent = backend.write(backend.clone(model), zeroed(weights, decision_of(found, chosen, ratio)))
        return evaluate(backend, silent, test, scene.metric)

    return SensitivityJob(
        groups=groups,
        ratios=stage.sensitivity.ratios,
        importance=stage.importance,
        samples=len(test) if isinstance(test, Split) else stage.sensitivity.samples or 0,
        weights_digest=digest_of(weights),
        definition=_definition(scene, plain),
        choose=choose,
        metric_of=metric_of,
        baseline=lambda: evaluate(backend, model, test, scene.metric),
        progress=lambda done, total: scene.progress.say(f"{name}: sensitivity, {done} of {total} points"),
    )


def _definition(scene: Scene, plain: PruneStage) -> str:
    """Digest of all that the curves depend on beside weights and samples."""
    metric = getattr(scene.metric, "__qualname__", type(scene.metric).__qualname__)
    return hashlib.sha256(f"{plain.model_dump_json()} {metric} {scene.plan.seed}".encode()).hexdigest()


def _first(source: Any, samples: int | None) -> Any:
    """The first samples; those of a loader are kept as batches."""
    if samples is None:
        return source
    if not isinstance(source, Split):
        return _first_batches(source, samples)
    if isinstance(source.inputs, tuple):
        return Split(tuple(array[:samples] for array in source.inputs), source.targets[:samples])
    return Split(source.inputs[:samples], source.targets[:samples])


def _first_batches(source: Any, samples: int) -> list[Batch]:
    found: list[Batch] = []
    left = samples
    for inputs, targets in batches(source):
        found.append((tuple(array[:left] for array in inputs), targets[:left]))
        left -= len(targets)
        if left <= 0:
            break
    return found
