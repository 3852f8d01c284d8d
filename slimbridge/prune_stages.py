"""How the stages that prune are carried out: what they collect first, what they train, what they tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from slimbridge.curves import Sensitivity
from slimbridge.decisions import MaskDecision, PruneDecision, decision_to_json, load_decision
from slimbridge.deploy.latency import measure_latency
from slimbridge.errors import listed
from slimbridge.files import write_file
from slimbridge.graph import Graph, Units, cost_of
from slimbridge.plan import PruneStage, SparsifyStage, TrainSection
from slimbridge.plan.registries import ENTRY_IMPORTANCES, IMPORTANCES, as_importance
from slimbridge.ports import Array, Layer, Loss, Model, Optimizer
from slimbridge.prune import Pruner
from slimbridge.prune.decide import Basis
from slimbridge.prune.evidence import Evidence, collect
from slimbridge.prune.gmp import GmpSchedule
from slimbridge.prune.native import native_masks
from slimbridge.prune.penalties import Penalty, penalty
from slimbridge.prune.soft import SoftPruning
from slimbridge.prune.sparsifier import Sparsifier, masked, masks_in_force, notes
from slimbridge.prune.target import target_note
from slimbridge.report.records import EpochRecord
from slimbridge.sensitivity_stage import sensitivity_ratios
from slimbridge.stages import Outcome, Scene, calibration, on_labels, skipped_notes, train_stage
from slimbridge.train import evaluate


def prune_stage(scene: Scene, name: str, stage: PruneStage, model: Model) -> Outcome:
    """Prepare, decide, remove, finetune."""
    epochs: tuple[EpochRecord, ...] = ()
    if stage.preparation is not None:
        model, epochs = _prepare(scene, name, stage, model)
    scene.progress.start(f"{name}: choosing channels", 1)
    whole = model
    basis, found = _basis(scene, name, stage, whole, scene.backend.trace(whole, scene.example))
    model, decision = _decided(scene, name, stage, whole, basis)
    masks = masks_in_force([*scene.decisions, decision])
    lines = _prune_notes(stage, decision, scene.backend.layers(model))
    if basis.ratios is not None:
        chosen = listed((f"{layer} {ratio:.2f}" for layer, ratio in basis.ratios.items()), 20)
        lines = (*lines, f"ratios from sensitivity curves, by first layer of a group: {chosen}")
    lines = (*lines, *_target_notes(scene, stage, basis, (whole, model)))
    outcome = Outcome(model, decision, epochs=epochs, notes=lines, sensitivity=found)
    if stage.finetune is None:
        return outcome
    metric = evaluate(scene.backend, model, scene.data.test, scene.metric, scene.progress)
    model, later = train_stage(scene, name, stage.finetune, model, on_labels(scene, model), masks=masks)
    return replace(outcome, model=model, metric_before_training=metric, epochs=(*epochs, *later))


def replayable(stage: PruneStage | SparsifyStage) -> bool:
    """Does the decision follow from the weights before the stage alone, so that another framework can repeat it?"""
    if stage.engine == "native":
        return False
    if isinstance(stage, SparsifyStage):
        return stage.gmp is None
    measured = stage.target is not None and stage.target.of == "latency"
    return stage.preparation is None and stage.sensitivity is None and not measured


def _decided(scene: Scene, name: str, stage: PruneStage, model: Model, basis: Basis) -> tuple[Model, PruneDecision]:
    """The pruned model; what was chosen by measured times is kept, so that a resumed stage goes on with the same."""
    if stage.target is None or stage.target.of != "latency":
        return Pruner(stage, basis).prune(scene.backend, model, scene.example)
    path = scene.file(f"pending-{name}.json")
    if path.exists():
        known = load_decision(path)
        assert isinstance(known, PruneDecision)
        return scene.backend.remove_channels(scene.backend.clone(model), known), known
    model, decision = Pruner(stage, basis).prune(scene.backend, model, scene.example)
    write_file(path, decision_to_json(decision))
    return model, decision


def basis_for(scene: Scene, stage: PruneStage, model: Model, graph: Graph) -> Basis:
    """What a decision rests on, without sensitivity curves and measured times: the same in a run and its replay."""
    needs = as_importance(IMPORTANCES.get(stage.importance)).needs
    shapes, costs = scene.before(0 if stage.relative_to == "initial" else stage.relative_to)
    return Basis(evidence_for(scene, stage, model, graph, needs), shapes, costs, seed=scene.plan.seed)


def evidence_for(scene: Scene, stage: PruneStage | SparsifyStage, model: Model, graph: Graph, needs: str) -> Evidence:
    """Gradients or activations over the calibration batches, where the importance needs them."""
    if needs == "weights" or stage.engine == "native":
        return Evidence()
    drawn = calibration(scene.backend, scene.data, scene.plan.seed, stage)
    return collect(scene.backend, model, graph, needs, drawn, on_labels(scene, model))


def _basis(scene: Scene, name: str, stage: PruneStage, model: Model, graph: Graph) -> tuple[Basis, Sensitivity | None]:
    basis = basis_for(scene, stage, model, graph)
    if stage.sensitivity is not None:
        found, ratios = sensitivity_ratios(scene, name, stage, model, graph, basis)
        return replace(basis, ratios=ratios), found
    if stage.target is None or stage.target.of != "latency":
        return basis, None
    one = [array[:1] for array in scene.example]

    def milliseconds(candidate: Model) -> float:
        return measure_latency(scene.backend, candidate, one, scene.plan.device).median_ms

    return replace(basis, latency=milliseconds), None


def _prepare(scene: Scene, name: str, stage: PruneStage, model: Model) -> tuple[Model, tuple[EpochRecord, ...]]:
    """The training that makes channels unimportant before they go; its checkpoint has a name of its own."""
    assert stage.preparation is not None
    backend, section = scene.backend, stage.preparation
    plain = stage.model_copy(update={"preparation": None, "finetune": None})
    graph = backend.trace(model, scene.example)
    pruner = Pruner(plain, basis_for(scene, plain, model, graph))
    if section.method == "soft":
        soft = SoftPruning(backend, partial(pruner.decide, graph))
        return train_stage(
            scene, f"{name}-preparation", section.train, model, on_labels(scene, model), before_step=soft
        )
    weights = backend.read(model)
    found = pruner.candidates(graph, weights)
    goes = _units_of(pruner.decide(graph, weights), found.units) if section.method == "growing" else set()
    term = penalty(section, backend.ops, found.units, graph, backend, model, goes, found.scope.groups)
    return _train_with(scene, f"{name}-preparation", section.train, model, term)


def _units_of(decision: PruneDecision, units: Units) -> set[int]:
    """The units that a decision removes."""
    groups = {group.layers: group.units for group in units.groups()}
    return {unit for choice in decision.groups for unit in groups[choice.layers][list(choice.removed)].tolist()}


def _train_with(
    scene: Scene, name: str, settings: TrainSection, model: Model, term: Penalty
) -> tuple[Model, tuple[EpochRecord, ...]]:
    labels = on_labels(scene, model)
    done = [0.0]

    def before_step(_: Model, __: Optimizer, step: int, steps: int) -> None:
        done[0] = step / (settings.epochs * steps)

    def objective(inputs: tuple[Array, ...], targets: Array) -> Loss:
        loss = labels(inputs, targets)
        return lambda result: {**loss(result), "penalty": term(result, done[0])}

    return train_stage(scene, name, settings, model, objective, before_step=before_step)


def sparsify_stage(scene: Scene, name: str, stage: SparsifyStage, model: Model) -> Outcome:
    """Choose masks, zero what they mask, and train on under them."""
    backend, held = scene.backend, masks_in_force(scene.decisions)
    scene.progress.start(f"{name}: choosing weights", 1)
    epochs: tuple[EpochRecord, ...] = ()
    if stage.gmp is not None:
        sparsifier = Sparsifier(stage, scene.plan.seed)
        gradual = GmpSchedule(backend, sparsifier, backend.layers(model), backend.trace(model, scene.example), held)
        labels = on_labels(scene, model)
        model, epochs = train_stage(scene, f"{name}-gmp", stage.gmp.train, model, labels, before_step=gradual)
        decision = gradual.final_decision(model)
    else:
        decision = decide_masks(scene, stage, model, held)
    masks = masks_in_force([*scene.decisions, decision])
    model = backend.write(model, masked(backend.read(model), masks))
    weights = backend.read(model)
    zeros = {name: (int((weights[name] == 0).sum()), int(weights[name].size)) for name in decision.masks}
    lines = (*notes(decision, weights), *skipped_notes(decision.skipped))
    outcome = Outcome(model, decision, epochs=epochs, notes=lines, zeros=zeros)
    if stage.finetune is None:
        return outcome
    metric = evaluate(backend, model, scene.data.test, scene.metric, scene.progress)
    model, later = train_stage(scene, name, stage.finetune, model, on_labels(scene, model), masks=masks)
    return replace(outcome, model=model, metric_before_training=metric, epochs=(*epochs, *later))


def decide_masks(scene: Scene, stage: SparsifyStage, model: Model, held: Mapping[str, Array]) -> MaskDecision:
    """The masks of a stage without gradual pruning, for a run and for its replay alike."""
    graph = scene.backend.trace(model, scene.example)
    if stage.engine == "native":
        return native_masks(stage, scene.backend, model, scene.example)
    needs = ENTRY_IMPORTANCES.get(stage.importance).needs
    evidence = evidence_for(scene, stage, model, graph, needs)
    weights = scene.backend.read(model)
    return Sparsifier(stage, scene.plan.seed).decide(scene.backend.layers(model), graph, weights, evidence, held=held)


def _prune_notes(stage: PruneStage, decision: PruneDecision, layers: Sequence[Layer]) -> tuple[str, ...]:
    axes = {"conv": 0, "linear": 0, "conv_transpose": 1}
    weights = [(layer.params.get("weight", ""), axes[layer.kind]) for layer in layers if layer.kind in axes]
    narrower = sum(axis in decision.kept.get(name, {}) for name, axis in weights)
    removed = sum(len(group.removed) for group in decision.groups)
    total = sum(group.channels for group in decision.groups)
    what = "attention heads" if stage.granularity == "heads" else "channels"
    line = (
        f"{removed} of {total} {what} removed; channel groups: {len(decision.groups)}; layers that lose outputs: "
        f"{narrower} of {len(weights)}"
    )
    unproved = () if decision.exact else ("channels of a LayerNorm went: that is not the same as zeroing them",)
    return (line, *unproved, *skipped_notes(decision.skipped))


def _target_notes(scene: Scene, stage: PruneStage, basis: Basis, models: tuple[Model, Model]) -> tuple[str, ...]:
    """Was the target reached? From the models before and after."""
    target = stage.target
    if target is None:
        return ()
    known = basis.initial_cost if stage.relative_to != "current" else None
    before, after = models
    if target.of == "latency":
        assert basis.latency is not None
        whole = known[target.of] if known else basis.latency(before)
        removed = 1.0 - basis.latency(after) / whole
        why = "times vary from one measurement to the next, and channels go whole"
        return (target_note("the latency (measured again)", target.remove, removed, why),)
    costs = [cost_of(scene.backend.trace(model, scene.example)) for model in models]
    whole = known[target.of] if known else float(getattr(costs[0], target.of))
    removed = 1.0 - float(getattr(costs[1], target.of)) / whole
    if stage.sensitivity is not None:
        why = "the sensitivity curves jump there: no tolerated loss comes nearer"
        return (target_note(target.of, target.remove, removed, why),)
    why = "layers that may not be pruned, whole channels, min_channels, max_ratio or round_to allow no other step"
    return (target_note(target.of, target.remove, removed, why),)
