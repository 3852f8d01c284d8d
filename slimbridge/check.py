"""Checks a plan without running it: everything but the training, and every mistake at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from slimbridge.distill import Distiller, missing_paths
from slimbridge.errors import PlanError, SlimbridgeError
from slimbridge.plan import DistillStage, Plan, PruneStage, QuantizeStage, load_plan
from slimbridge.ports import Backend, Model
from slimbridge.prune import Pruner
from slimbridge.quantize import Quantizer
from slimbridge.resolve import build_model, plan_data, with_defaults
from slimbridge.runner import find_backend, first_inputs
from slimbridge.tasks import Data
from slimbridge.weights import load_weights

T = TypeVar("T")


def check(source: str | Path | Mapping[str, Any] | Plan, backend: str | None = None) -> list[str]:
    """All mistakes of a plan, one line each; an empty list when there is none.

    Args:
        source: a shipped plan's name, a path, a mapping or a plan.
        backend: used to build the model and resolve layer names; None takes the first that is installed.
    """
    try:
        plan = load_plan(source)
    except PlanError as error:
        return list(error.findings)
    return _Check(plan).run(backend)


class _Check:
    """Collects the mistakes of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.findings: list[str] = []

    def run(self, backend: str | None) -> list[str]:
        side = self._try("backend", lambda: find_backend(None, backend or self.plan.backend))
        self._try("plan", lambda: with_defaults(self.plan))
        data = self._try("data", lambda: plan_data(self.plan)) if self.plan.data else None
        if side is None:
            return self.findings
        devices = side.capabilities().devices
        if self.plan.device not in devices:
            self.findings.append(f"device: '{self.plan.device}' is not there; {side.name} has {', '.join(devices)}")
        if self.plan.model is not None:
            model = self._try("model", lambda: build_model(self.plan, side))
            if model is not None:
                self._with_model(side, model, data)
        return self.findings

    def _try(self, where: str, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except SlimbridgeError as error:
            self.findings.extend(f"{where}: {line}" for line in str(error).splitlines())
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            self.findings.append(f"{where}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
        return None

    def _with_model(self, side: Backend, model: Model, data: Data | None) -> None:
        weights = self.plan.baseline.weights
        if weights is not None:
            self._try("baseline.weights", lambda: side.write(model, load_weights(Path(weights))))
        if data is None:
            return
        example = first_inputs(data, 1)
        if self._try("data does not fit the model", lambda: side.forward(model, example)) is None:
            return
        teacher = side.clone(model)
        student = side.clone(model)
        for index, stage in enumerate(self.plan.stages):
            where = f"stages[{index}]"
            if isinstance(stage, PruneStage):
                pruned = self._try(where, partial(Pruner(stage).prune, side, student, example))
                student = pruned[0] if pruned is not None else student
            elif isinstance(stage, QuantizeStage):
                self._try(where, partial(Quantizer(stage).chosen, side.layers(student)))
            elif isinstance(stage, DistillStage):
                self._distill(where, stage, side, student, teacher, example)

    def _distill(
        self, where: str, stage: DistillStage, side: Backend, student: Model, teacher: Model, example: Any
    ) -> None:
        distiller = Distiller(stage)
        if stage.teacher.model != "baseline":
            path = Path(str(stage.teacher.weights))
            self._try(f"{where}.teacher.weights", lambda: load_weights(path))
            return
        missing = list(self._missing(distiller, side, student, teacher))
        self.findings.extend(f"{where}.losses: {line}" for line in missing)
        if not missing:
            self._try(where, lambda: distiller.decide(side, student, teacher, "", example))

    def _missing(self, distiller: Distiller, side: Backend, student: Model, teacher: Model) -> Iterator[str]:
        for word, model in (("student", student), ("teacher", teacher)):
            yield from missing_paths(distiller.paths(word), side.module_paths(model), word)
