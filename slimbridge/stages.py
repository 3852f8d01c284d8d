"""How each kind of stage is carried out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from slimbridge.curves import Sensitivity
from slimbridge.decisions import Decision, Skipped
from slimbridge.distill import Distiller, hard_labels, terms
from slimbridge.errors import listed
from slimbridge.plan import (
    BaselineSection,
    DistillStage,
    FinetuneStage,
    Plan,
    PruneStage,
    QuantizeStage,
    SparsifyStage,
    TrainSection,
)
from slimbridge.ports import Array, Backend, Loss, Model, Pass, tensors_in
from slimbridge.prune.sparsifier import masks_in_force
from slimbridge.report.records import EpochRecord
from slimbridge.resolve import zoo_model
from slimbridge.tasks import Data, Split, batches, epoch_order
from slimbridge.tasks.data import Batch, check_classes
from slimbridge.tasks.metrics import Metric
from slimbridge.train import Progress, Training, derived_seed, evaluate, seed_all, train
from slimbridge.train.loop import BeforeStep, Objective
from slimbridge.weights import digest_of, load_weights

UserLoss = Callable[[Any, Any], Any]
"""(the model's output, the batch's targets as a native tensor) -> native scalar."""


@dataclass(frozen=True)
class Scene:
    """What every stage works with.

    Attributes:
        backend, plan, data, metric, progress: as the run was given them.
        example: inputs of one forward pass, batch 1.
        loss: the user's own loss on labels; None is the task's.
        checkpoint: from a training's name to the file of its checkpoint.
        teacher: makes a new copy of the baseline with its weights.
        file: from a name to a file that is gone when the stage is complete.
        before: from the number of a stage (0 is the baseline) to the shapes of the parameters after it, and its
            {"parameters", "macs", "latency"}; None gives nothing.
        decisions: of the stages before, in order.
    """

    backend: Backend
    plan: Plan
    data: Data
    metric: Metric
    progress: Progress
    example: tuple[Array, ...]
    loss: UserLoss | None
    checkpoint: Callable[[str], Path]
    teacher: Callable[[], Model]
    file: Callable[[str], Path]
    before: Callable[[Any], tuple[Mapping[str, Sequence[int]], Mapping[str, float] | None]]
    decisions: tuple[Decision, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """A model after a stage, and what is to be told of it."""

    model: Model
    decision: Decision | None = None
    metric_before_training: float | None = None
    epochs: tuple[EpochRecord, ...] = ()
    notes: tuple[str, ...] = ()
    sensitivity: Sensitivity | None = None
    zeros: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def run_stage(scene: Scene, name: str, stage: Any, model: Model) -> Outcome:
    """Carry out one stage on a model, which may be changed in place."""
    from slimbridge.prune_stages import prune_stage, sparsify_stage  # they are made of what is here
    from slimbridge.quantize_stage import quantize_stage

    runners: dict[type, Callable[[Scene, str, Any, Model], Outcome]] = {
        BaselineSection: _baseline,
        PruneStage: prune_stage,
        SparsifyStage: sparsify_stage,
        DistillStage: _distill,
        QuantizeStage: quantize_stage,
        FinetuneStage: _finetune,
    }
    return runners[type(stage)](scene, name, stage, model)


def _baseline(scene: Scene, name: str, stage: BaselineSection, model: Model) -> Outcome:
    notes: tuple[str, ...] = ()
    if stage.weights is not None:
        model = scene.backend.write(model, load_weights(Path(stage.weights)))
        notes = (f"starts from the weights in {Path(*Path(stage.weights).parts[-3:])}",)
    if stage.train is None:
        return Outcome(model, notes=notes)
    model, epochs = train_stage(scene, name, stage.train, model, on_labels(scene, model))
    return Outcome(model, epochs=epochs, notes=notes)


def _finetune(scene: Scene, name: str, stage: FinetuneStage, model: Model) -> Outcome:
    model, epochs = train_stage(scene, name, stage.train, model, on_labels(scene, model))
    return Outcome(model, epochs=epochs)


def skipped_notes(skipped: tuple[Skipped, ...]) -> tuple[str, ...]:
    """A line for each reason for which layers were left alone."""
    reasons: dict[str, list[str]] = {}
    for item in skipped:
        reasons.setdefault(item.reason, []).append(item.layer)
    return tuple(f"left alone: {listed(layers, 6)}: {reason}" for reason, layers in reasons.items())


def _distill(scene: Scene, name: str, stage: DistillStage, model: Model) -> Outcome:
    backend, distiller = scene.backend, Distiller(stage)
    teacher = _teacher(scene, stage)
    digest = digest_of(backend.read(teacher))
    decision = distiller.decide(backend, model, teacher, digest, scene.example)
    paths = distiller.paths("teacher")

    def objective(inputs: tuple[Array, ...], targets: Array) -> Loss:
        labels = backend.tensor(model, targets)
        taught = backend.forward(teacher, inputs, paths) if distiller.needs_teacher else None

        def loss(result: Pass) -> Mapping[str, Any]:
            if distiller.needs_labels:
                check_classes(targets, tuple(backend.ops.shape(tensors_in(result.output)[0])), "train")
            return terms(decision, backend.ops, result, taught, labels)

        return loss

    before = evaluate(backend, model, scene.data.test, scene.metric, scene.progress)
    model, epochs = train_stage(scene, name, stage.train, model, objective, distiller.paths("student"))
    return Outcome(model, decision, before, epochs)


def _teacher(scene: Scene, stage: DistillStage) -> Model:
    if stage.teacher.model == "baseline":
        return scene.teacher()
    model = zoo_model(stage.teacher.model, scene.backend)
    model = scene.backend.place(model, scene.plan.device)
    return scene.backend.write(model, load_weights(Path(str(stage.teacher.weights))))


class Calibrated(Protocol):
    """A stage that looks at training data before it decides."""

    @property
    def calibration_batches(self) -> int:
        """How many."""

    @property
    def calibration_batch_size(self) -> int:
        """Samples in each."""


def calibration_stream(backend: Backend, data: Data, seed: int, stage: Calibrated) -> Iterator[Batch]:
    """The training batches that a stage looks at, one at a time: the same on every framework."""
    seed_all(backend, derived_seed(seed, "calibration"))
    source, size, count = data.train, stage.calibration_batch_size, stage.calibration_batches
    order = None
    if isinstance(source, Split):
        order = epoch_order(len(source), seed, "calibration")[: size * count]
    return islice(batches(source, size, order), count)


def calibration(backend: Backend, data: Data, seed: int, stage: Calibrated) -> list[Batch]:
    """All of them."""
    return list(calibration_stream(backend, data, seed, stage))


def on_labels(scene: Scene, model: Model) -> Objective:
    """The loss on labels alone: the user's own, or the task's cross entropy."""
    ops = scene.backend.ops

    def objective(inputs: tuple[Array, ...], targets: Array) -> Loss:
        def loss(result: Pass) -> dict[str, Any]:
            labels = scene.backend.tensor(model, targets)
            if scene.loss is not None:
                return {"loss": scene.loss(result.output, labels)}
            logits = tensors_in(result.output)[0]
            check_classes(targets, tuple(ops.shape(logits)), "train")
            return {"hard_labels": hard_labels(ops, logits, labels)}

        return loss

    return objective


def train_stage(
    scene: Scene,
    name: str,
    settings: TrainSection,
    model: Model,
    objective: Objective,
    capture: tuple[str, ...] = (),
    before_step: BeforeStep | None = None,
    masks: Mapping[str, Array] | None = None,
) -> tuple[Model, tuple[EpochRecord, ...]]:
    """Train in place, under the masks that are in force.

    Args:
        scene: what every stage works with.
        name: of the training: of its checkpoint and its data order.
        settings: how to train.
        model: trained in place.
        objective: the loss of a batch.
        capture: layer paths whose features the loss looks at.
        before_step: see `Training`.
        masks: in place of those that the stages before left.
    """
    held = masks_in_force(scene.decisions) if masks is None else masks
    training = Training(
        settings,
        scene.data.train,
        objective,
        scene.plan.seed,
        name,
        capture,
        scene.checkpoint(name),
        scene.progress,
        before_step,
        held,
    )
    return train(scene.backend, model, training)
