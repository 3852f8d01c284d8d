"""Goes through a plan's stages without training: finds, before anything costs time, what would stop the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slimbridge.decisions import Decision, MaskDecision, PruneDecision
from slimbridge.distill import Distiller, missing_paths
from slimbridge.errors import FAILURES, SlimbridgeError, first_line
from slimbridge.plan import DistillStage, FinetuneStage, Plan, PruneStage, QuantizeStage, SparsifyStage
from slimbridge.plan.registries import ENTRY_IMPORTANCES, IMPORTANCES, as_importance
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.prune import Pruner
from slimbridge.prune.decide import Basis
from slimbridge.prune.evidence import Evidence
from slimbridge.prune.native import native_masks
from slimbridge.prune.penalties import penalty
from slimbridge.prune.sparsifier import Sparsifier, masks_in_force
from slimbridge.quantize_stage import rehearse_quantize
from slimbridge.tasks import Data, Split, batches
from slimbridge.tasks.data import check_classes
from slimbridge.weights import load_weights

T = TypeVar("T")
EXAMPLE = 2
"""Samples of an example pass: some models are defined for more than one only."""


def first_inputs(data: Data, count: int) -> tuple[Array, ...]:
    """Inputs of the first `count` test samples (fewer where there are fewer, or a loader's first batch is smaller)."""
    return first_batch(data.test, count)[0]


def first_batch(source: Any, count: int) -> tuple[tuple[Array, ...], Array]:
    """The first `count` samples, inputs and targets."""
    order = np.arange(min(count, len(source))) if isinstance(source, Split) else None
    inputs, targets = next(iter(batches(source, count, order)))
    return tuple(array[:count] for array in inputs), targets[:count]


def rehearse(backend: Backend, plan: Plan, model: Model, data: Data, task_loss: bool = True) -> list[str]:
    """All that would stop a run, one line each; an empty list when nothing would.

    Args:
        backend: the model's backend.
        plan: it is gone through stage by stage; a stage that fails is left out for those after it.
        model: left as it is.
        data: one sample of it is run, and the labels are looked at.
        task_loss: the loss is the task's own, so labels must be classes.
    """
    rehearsal = Rehearsal(backend, plan)
    rehearsal.run(model, data, task_loss)
    return rehearsal.findings


class Rehearsal:
    """Collects findings."""

    def __init__(self, backend: Backend, plan: Plan) -> None:
        self.backend, self.plan = backend, plan
        self.findings: list[str] = []
        self.shapes: list[dict[str, tuple[int, ...]]] = []
        self.decisions: list[Decision] = []

    def run(self, model: Model, data: Data, task_loss: bool) -> None:
        """Go through the plan; see `rehearse`."""
        backend = self.backend
        model = backend.clone(model)
        weights = self.plan.baseline.weights
        if weights is not None:
            self.attempt("baseline.weights", lambda: backend.write(model, load_weights(Path(weights))))
        inputs, _ = first_batch(data.test, EXAMPLE)
        done = self.attempt("the test data does not fit the model", lambda: backend.forward(model, inputs))
        learned, _ = first_batch(data.train, EXAMPLE)
        also = self.attempt("the training data does not fit the model", lambda: backend.forward(model, learned))
        if done is None or also is None:
            return
        if task_loss and self._learns_labels():
            output = tensors_in(done.output)[0]
            self.attempt("data", partial(_check_labels, data, tuple(backend.ops.shape(output))))
        self._stages(model, inputs)

    def _learns_labels(self) -> bool:
        """Does any training of the plan look at labels?"""
        stages = self.plan.stages
        parts = ("finetune", "preparation", "gmp", "qat")
        trained = (self.plan.baseline.train, *(getattr(stage, part, None) for stage in stages for part in parts))
        rated = any(_needs_gradients(stage) for stage in stages)
        distilled = (Distiller(stage).needs_labels for stage in stages if isinstance(stage, DistillStage))
        return rated or any(trained) or any(distilled) or any(isinstance(stage, FinetuneStage) for stage in stages)

    def attempt(self, where: str, work: Callable[[], T]) -> T | None:
        """The result of some work, or None and a finding."""
        try:
            return work()
        except SlimbridgeError as error:
            self.findings.extend(f"{where}: {line}" for line in str(error).splitlines())
        except FAILURES as error:
            self.findings.append(f"{where}: {first_line(error)}")
        return None

    def _stages(self, model: Model, example: tuple[Array, ...]) -> None:
        backend, student = self.backend, model
        self.shapes.append({name: array.shape for name, array in backend.read(model).items()})
        for index, stage in enumerate(self.plan.stages):
            where = f"stages[{index}]"
            if isinstance(stage, PruneStage):
                pruned = self.attempt(where, partial(self._prune, stage, student, example))
                pruned = pruned or self._without_wrong_names(stage, student, example)
                if pruned is not None:
                    self.attempt(where, partial(self._prepare, stage, student, example))
                    student = pruned[0]
                    self.decisions.append(pruned[1])
            elif isinstance(stage, SparsifyStage):
                masked = self.attempt(where, partial(self._sparsify, stage, student, example))
                self.decisions.extend([masked] if masked is not None else [])
            elif isinstance(stage, QuantizeStage):
                self.attempt(where, partial(rehearse_quantize, backend, student, stage, example))
            elif isinstance(stage, DistillStage):
                self._distill(where, stage, student, model, example)
            self.shapes.append({name: array.shape for name, array in backend.read(student).items()})

    def _prune(self, stage: PruneStage, model: Model, example: tuple[Array, ...]) -> tuple[Model, PruneDecision]:
        """Prune by the weights as they are."""
        start = 0 if stage.relative_to == "initial" else stage.relative_to
        basis = Basis(initial=self.shapes[start] if isinstance(start, int) else {})
        return Pruner(self._by_weights(stage), basis).prune(self.backend, model, example)

    def _by_weights(self, stage: PruneStage) -> PruneStage:
        """The stage without what is only known while the plan runs."""
        changes: dict[str, Any] = {"preparation": None}
        if as_importance(IMPORTANCES.get(stage.importance)).needs != "weights":
            changes |= {"importance": "l1_norm", "importance_options": {}, "rated": None}
        if stage.sensitivity is not None or (stage.target is not None and stage.target.of == "latency"):
            changes |= {"sensitivity": None, "target": None, "pruning_ratio": 0.5}
        return stage.model_copy(update=changes)

    def _prepare(self, stage: PruneStage, model: Model, example: tuple[Array, ...]) -> None:
        """A penalty must find what it acts on; what will grow is known only when the plan runs."""
        if stage.preparation is not None and stage.preparation.method in ("group_lasso", "bn_slimming"):
            backend, graph = self.backend, self.backend.trace(model, example)
            found = Pruner(self._by_weights(stage)).candidates(graph, backend.read(model))
            groups = found.scope.groups
            penalty(stage.preparation, backend.ops, found.units, graph, backend, model, groups=groups)

    def _sparsify(self, stage: SparsifyStage, model: Model, example: tuple[Array, ...]) -> MaskDecision:
        if stage.engine == "native":
            return native_masks(stage, self.backend, model, example)
        if ENTRY_IMPORTANCES.get(stage.importance).needs != "weights":
            stage = stage.model_copy(update={"importance": "magnitude", "importance_options": {}})
        graph, weights = self.backend.trace(model, example), self.backend.read(model)
        held = masks_in_force(self.decisions)
        return Sparsifier(stage, self.plan.seed).decide(
            self.backend.layers(model), graph, weights, Evidence(), held=held
        )

    def _without_wrong_names(self, stage: PruneStage, model: Model, example: tuple[Array, ...]) -> Any:
        """Prune once more without the patterns that match nothing, so that later stages can be looked at."""
        paths = [layer.path for layer in self.backend.layers(model)]
        right = tuple(p for p in stage.ignored_layers if any(fnmatchcase(path, p) for path in paths))
        if right == stage.ignored_layers:
            return None
        try:
            return self._prune(stage.model_copy(update={"ignored_layers": right}), model, example)
        except SlimbridgeError:
            return None

    def _distill(self, where: str, stage: DistillStage, student: Model, teacher: Model, example: Any) -> None:
        distiller = Distiller(stage)
        if stage.teacher.model != "baseline":
            path = Path(str(stage.teacher.weights))
            self.attempt(f"{where}.teacher.weights", lambda: load_weights(path))
            return
        missing = list(self._missing(distiller, student, teacher))
        self.findings.extend(f"{where}.losses: {line}" for line in missing)
        if not missing:
            self.attempt(where, lambda: distiller.decide(self.backend, student, teacher, "", example))

    def _missing(self, distiller: Distiller, student: Model, teacher: Model) -> Iterator[str]:
        for word, model in (("student", student), ("teacher", teacher)):
            yield from missing_paths(distiller.paths(word), self.backend.module_paths(model), word)


def _needs_gradients(stage: Any) -> bool:
    """Does the stage's importance look at the loss?"""
    if isinstance(stage, PruneStage):
        needs = as_importance(IMPORTANCES.get(stage.importance)).needs
    elif isinstance(stage, SparsifyStage):
        needs = ENTRY_IMPORTANCES.get(stage.importance).needs
    else:
        return False
    return stage.engine == "own" and needs in ("gradients", "squared_gradients")


def _check_labels(data: Data, output: tuple[int, ...]) -> None:
    """Labels must be classes of the model: all of them where they lie in memory, else those of the first batch."""
    for part, source in (("train", data.train), ("test", data.test)):
        targets = source.targets if isinstance(source, Split) else first_batch(source, 1 << 30)[1]
        check_classes(targets, output, part)
