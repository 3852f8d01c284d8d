"""One run of a plan on one backend: its stages, in order, in its folder."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slimbridge import __version__
from slimbridge.decisions import Decision, PruneDecision, QuantizeDecision
from slimbridge.deploy.latency import measure_latency
from slimbridge.errors import FAILURES, ModelError, PlanError, RunError
from slimbridge.files import locked
from slimbridge.graph import cost_of
from slimbridge.plan import BaselineSection, Plan
from slimbridge.ports import Array, Backend, DType, Model
from slimbridge.quantize.quantizer import insert
from slimbridge.rehearse import EXAMPLE, first_inputs, rehearse
from slimbridge.report.records import RunReport, StageRecord
from slimbridge.resolve import build_model, plan_data, with_defaults
from slimbridge.runfolder import RunFolder, StageResult, stage_names
from slimbridge.stages import Outcome, Scene, UserLoss, run_stage
from slimbridge.tasks import Data, Split, batches, metrics
from slimbridge.tasks.metrics import Metric
from slimbridge.train import Progress, derived_seed, evaluate, outputs_of, seed_all
from slimbridge.train.checkpoint import load_checkpoint
from slimbridge.weights import digest_of

PROBE = 64
"""Test samples whose outputs each stage saves, so that another framework can be compared with it."""


@dataclass(frozen=True)
class Given:
    """A user's own parts of a run, each None where the plan says it."""

    model: Model | None = None
    data: Data | None = None
    loss: UserLoss | None = None
    metric: Metric | None = None


def rebuild(backend: Backend, model: Model, folder: RunFolder, upto: str) -> Model:
    """Give a model, in place, the form and weights that a run had after a stage.

    Raises:
        RunError: the model's layers are not those of the run.
    """
    try:
        model = change_form(backend, model, folder.changes(upto))
        return backend.write(model, folder.weights(upto))
    except ModelError as error:
        raise RunError(f"{folder.path}: the model is not of this run's architecture: {error}") from error


def change_form(backend: Backend, model: Model, decisions: Iterable[Decision]) -> Model:
    """Carry out what decisions change of a model's form: channels, fake quantization."""
    for decision in decisions:
        if isinstance(decision, PruneDecision):
            model = backend.remove_channels(model, decision)
        elif isinstance(decision, QuantizeDecision):
            model = insert(backend, model, decision)
    return model


def probe_inputs(backend: Backend, data: Data, seed: int) -> tuple[Array, ...]:
    """The test samples that the probe runs; a loader that shuffles gives the same ones each time on one framework."""
    seed_all(backend, derived_seed(seed, "probe"))
    return first_inputs(data, PROBE)


def digest_of_inputs(inputs: tuple[Array, ...]) -> str:
    """Digest of the arrays of one batch."""
    return digest_of({str(index): array for index, array in enumerate(inputs)})


def machine() -> str:
    """Processor architecture, cores, operating system, Python."""
    cores = os.cpu_count() or 1
    return f"{platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}"


class Run:
    """One run: the scene, the folder, and the model as it stands."""

    def __init__(self, scene: Scene, folder: RunFolder, start: Model) -> None:
        self.scene, self.folder, self._start = scene, folder, start

    @classmethod
    def begin(cls, side: Backend, plan: Plan, given: Given, path: Path, resume: bool, progress: Progress) -> Run:
        """Rehearse the plan and open the folder; SlimbridgeError with every finding, and nothing written."""
        plan = with_defaults(plan)
        data = given.data or plan_data(plan)
        start = side.clone(given.model) if given.model is not None else build_model(plan, side)
        start = side.place(start, plan.device, _dtype(side, start))
        weights = side.read(start)
        plan = _truthful(plan, given, side, weights)
        facts = _facts(side, given, data, weights)
        resumed = RunFolder.reopen(path, plan, facts) if resume and (path / "run.json").exists() else None
        if resumed is not None:
            folder, start = resumed, resumed.restart(side, start)
        else:
            findings = rehearse(side, plan, start, data, given.loss is None)
            if findings:
                raise PlanError(f"plan '{plan.name}': {line}" for line in findings)
            folder = RunFolder.create(path, plan, facts, weights)
        scene = Scene(
            backend=side,
            plan=plan,
            data=data,
            metric=given.metric or metrics.get("accuracy"),
            progress=progress,
            example=first_inputs(data, EXAMPLE),
            loss=given.loss,
            checkpoint=folder.checkpoint,
            teacher=lambda: rebuild(side, side.clone(start), folder, "00-baseline"),
            file=folder.file,
            before=folder.before,
        )
        return cls(scene, folder, start)

    def run(self) -> tuple[Model, RunReport]:
        """All stages; those that are complete are read back. RunError when another process works in the folder."""
        with locked(self.folder.path / ".lock"):
            return self._run()

    def _run(self) -> tuple[Model, RunReport]:
        names = stage_names(self.scene.plan)
        stages = (self.scene.plan.baseline, *self.scene.plan.stages)
        done = self.folder.complete_stages()
        model = self.scene.backend.clone(self._start)
        if done:
            self.folder.tidy(done[-1])
            model = rebuild(self.scene.backend, model, self.folder, done[-1])
            self.scene.progress.say(f"{self.scene.backend.name}: {', '.join(done)} done before")
        for index, (name, stage) in enumerate(zip(names, stages, strict=True)):
            if name not in done:
                model = self._stage(index, name, stage, model)
        report = self._report(names)
        self.folder.write_report(report)
        return model, report

    def _stage(self, index: int, name: str, stage: Any, model: Model) -> Model:
        backend, plan = self.scene.backend, self.scene.plan
        found = load_checkpoint(self.folder.checkpoint(name))
        before = sum(epoch.seconds for epoch in found.history) if found else 0.0
        started = time.perf_counter() - before
        digest = digest_of(backend.read(model))
        earlier = self.folder.changes(stage_names(plan)[index - 1]) if index else ()
        outcome = run_stage(replace(self.scene, decisions=tuple(earlier)), name, stage, model)
        seconds = time.perf_counter() - started
        weights = backend.read(outcome.model)
        kind = "baseline" if isinstance(stage, BaselineSection) else stage.kind
        record = self._measure(outcome, index, kind, name, seconds, digest)
        inputs = probe_inputs(backend, self.scene.data, plan.seed)
        probe = outputs_of(backend, outcome.model, inputs)
        self.folder.commit(name, StageResult(record, weights, outcome.decision, probe, digest_of_inputs(inputs)))
        self.scene.progress.say(f"{backend.name} {name}: {_summary(record)} ({plan.name})")
        return outcome.model

    def _measure(self, outcome: Outcome, index: int, kind: Any, name: str, seconds: float, digest: str) -> StageRecord:
        scene, backend = self.scene, self.scene.backend
        metric = evaluate(backend, outcome.model, scene.data.test, scene.metric, scene.progress)
        cost = cost_of(backend.trace(outcome.model, scene.example))
        one = [array[:1] for array in scene.example] if self._takes_one(outcome.model) else scene.example
        return StageRecord(
            index=index,
            kind=kind,
            name=name,
            metric=metric,
            metric_before_training=outcome.metric_before_training,
            parameters=cost.parameters,
            macs=cost.macs,
            size_bytes=0,
            latency=measure_latency(backend, outcome.model, one, scene.plan.device, kind == "quantize"),
            seconds=round(seconds, 2),
            input_digest=digest,
            decision_digest=outcome.decision.digest() if outcome.decision else None,
            epochs=outcome.epochs,
            notes=outcome.notes,
            sensitivity=outcome.sensitivity,
            zeros=dict(outcome.zeros),
        )

    def _takes_one(self, model: Model) -> bool:
        """Does the model run on a single sample, as latency is measured?"""
        try:
            self.scene.backend.forward(model, [array[:1] for array in self.scene.example])
        except FAILURES:
            return False
        return True

    def _report(self, names: tuple[str, ...]) -> RunReport:
        facts = self.folder.facts()
        return RunReport(
            plan=self.scene.plan.name,
            backend=self.scene.backend.name,
            versions={"slimbridge": facts["slimbridge"], **facts["versions"]},
            machine=facts["machine"],
            device=self.scene.plan.device,
            metric_name=_metric_name(self.scene.metric),
            metric_is_share=self.scene.metric in metrics.METRICS.values(),
            stages=tuple(self.folder.record(name) for name in names),
            deployment=self.folder.deployment(),
        )


def _dtype(side: Backend, model: Model) -> DType:
    """float64 for a model in it, else float32; ModelError for half precision, which is not trained here."""
    kinds = {array.dtype.name for array in side.read(model).values() if array.dtype.kind not in "iub"}
    if not kinds <= {"float32", "float64"}:
        raise ModelError(f"the model's weights are {', '.join(sorted(kinds))}; float32 and float64 are supported")
    return "float64" if kinds == {"float64"} else "float32"


def _metric_name(metric: Metric) -> str:
    name = getattr(metric, "__name__", "metric")
    return name if name.isidentifier() else "metric"


def _facts(side: Backend, given: Given, data: Data, weights: Mapping[str, Array]) -> dict[str, Any]:
    """run.json: what a run began with, so that it is resumed with nothing else."""
    return {
        "backend": side.name,
        "slimbridge": __version__,
        "versions": dict(side.capabilities().versions),
        "machine": machine(),
        "model": {name: list(array.shape) for name, array in weights.items()},
        "data": {part: fingerprint(source) for part, source in (("train", data.train), ("test", data.test))},
        "loss": _function_name(given.loss),
        "metric": _function_name(given.metric),
    }


def fingerprint(source: Split | Iterable[Any]) -> str:
    """Digest of arrays; of any other source only what can be known without reading it: its kind and length."""
    if isinstance(source, Split):
        inputs = source.inputs if isinstance(source.inputs, tuple) else (source.inputs,)
        return digest_of({"targets": source.targets, **{f"input {i}": array for i, array in enumerate(inputs)}})
    if isinstance(source, (list, tuple)):
        found = {}
        for index, (inputs, targets) in enumerate(batches(source)):
            found[f"{index}"] = targets
            found.update({f"{index} input {i}": array for i, array in enumerate(inputs)})
        return digest_of(found)
    try:
        length = str(len(source)) if isinstance(source, Sized) else "?"
    except (TypeError, ValueError, NotImplementedError):
        length = "?"
    return f"{type(source).__name__} of {length}"


def _function_name(function: Any) -> str | None:
    if function is None:
        return None
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _truthful(plan: Plan, given: Given, side: Backend, weights: Mapping[str, Array]) -> Plan:
    """The plan as it is run: its backend named, without the model or data that arguments took the place of."""
    changes: dict[str, Any] = {"backend": side.name}
    if given.data is not None:
        changes["data"] = None
    if given.model is not None and plan.model is not None:
        named = side.read(build_model(plan, side))
        if {name: array.shape for name, array in named.items()} != {n: array.shape for n, array in weights.items()}:
            changes["model"] = None
    return plan.model_copy(update=changes)


def _summary(record: StageRecord) -> str:
    return f"metric {record.metric:.4f}, {record.parameters:,} parameters, {record.macs:,} MACs, {record.seconds:.1f} s"
