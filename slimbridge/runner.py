"""Runs a plan on one backend: `compress`, and `restore` for what a run left."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge import __version__
from slimbridge.decisions import Decision, PruneDecision
from slimbridge.deploy.latency import measure_latency
from slimbridge.discovery import backend_of, get_backend, installed_backend
from slimbridge.errors import BackendError, RunError
from slimbridge.graph import cost_of
from slimbridge.plan import BaselineSection, Plan, load_plan
from slimbridge.ports import Array, Backend, Model
from slimbridge.report.records import RunReport, StageRecord
from slimbridge.resolve import build_model, plan_data, with_defaults
from slimbridge.runfolder import RunFolder, StageResult, stage_names
from slimbridge.stages import Outcome, Scene, UserLoss, run_stage
from slimbridge.tasks import Data, Split, batches, metrics
from slimbridge.tasks.metrics import Metric
from slimbridge.train import Progress, Quiet, evaluate, outputs_of
from slimbridge.train.checkpoint import load_checkpoint
from slimbridge.weights import digest_of

PROBE = 64
"""Test samples whose outputs each stage saves, so that another framework can be compared with it."""


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: the compressed model, a native model of its framework.
        report: accuracy, size, cost, latency after each stage; print it.
        folder: the run's folder.
    """

    model: Model
    report: RunReport
    folder: Path
    _keep: Any = field(default=None, repr=False)

    def save(self, path: str | Path) -> Path:
        """Copy the run's folder to a new or empty one, and write its report as HTML too.

        Raises:
            RunError: the target holds something already, or cannot be written.
        """
        from slimbridge.report.html import write_html
        from slimbridge.report.records import Comparison

        target = Path(path)
        if target.resolve() != self.folder.resolve():
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise RunError(f"{target}: exists and is not empty; name another folder")
            try:
                shutil.copytree(self.folder, target, dirs_exist_ok=True)
            except (OSError, shutil.Error) as error:
                raise RunError(f"{target}: cannot be written: {error}") from error
        write_html(target / "report.html", Comparison(runs=(self.report,), verdicts=()))
        return target


@dataclass(frozen=True)
class Given:
    """A user's own parts of a run, each None where the plan says it."""

    model: Model | None = None
    data: Data | None = None
    loss: UserLoss | None = None
    metric: Metric | None = None


def compress(
    model: Model | None,
    plan: str | Path | Mapping[str, Any] | Plan,
    *,
    data: Data | tuple[Any, Any] | None = None,
    loss: UserLoss | None = None,
    metric: Metric | None = None,
    backend: str | None = None,
    device: str | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run a plan on a model.

    Args:
        model: a torch.nn.Module or paddle.nn.Layer, left as it is; None builds the plan's own.
        plan: a shipped plan's name, a path, a mapping or a `Plan`.
        data: `Data` or a pair (train, test); each part a `Split` or a re-iterable of (inputs, targets) batches of
            NumPy arrays or native tensors, a DataLoader for one. None takes the plan's.
        loss: (output, targets) -> native scalar, in place of the task's loss on labels.
        metric: (outputs, targets) as arrays -> number, in place of the task's metric.
        backend: its name, where no model is given; else found from the model's type.
        device: "cpu" or "gpu", in place of the plan's.
        run_dir: the run's folder, new or empty; None uses a temporary one, see `Result.save`.
        resume: go on with the run in `run_dir`, if there is one.
        progress: who is told; None is quiet.

    Raises:
        SlimbridgeError: any mistake in plan, data or model, in one or two lines.
    """
    plan = load_plan(plan)
    if device is not None:
        plan = load_plan({**plan.model_dump(), "device": device})
    side = find_backend(model, backend or plan.backend)
    given = Given(model, _as_data(data), loss, metric)
    keep = None if run_dir is not None else tempfile.TemporaryDirectory(prefix="slimbridge-")
    path = Path(run_dir) if run_dir is not None else Path(str(keep and keep.name))
    run = _Run.begin(side, plan, given, path, resume, progress or Quiet())
    final, report = run.run()
    return Result(final, report, path, keep)


def restore(model: Model, run_dir: str | Path) -> Model:
    """The compressed model from a fresh, uncompressed one and the run's folder.

    Args:
        model: of the run's architecture, on any framework, left as it is.
        run_dir: of a complete run.

    Raises:
        RunError, ModelError: it is no run folder, or the model does not fit it.
    """
    folder = RunFolder(Path(run_dir))
    names = [name for name in stage_names(folder.plan()) if folder.done(name)]
    if not names:
        raise RunError(f"{run_dir}: no stage is complete")
    side = backend_of(model)
    return rebuild(side, side.clone(model), folder, names[-1])


def rebuild(backend: Backend, model: Model, folder: RunFolder, upto: str) -> Model:
    """Give a model, in place, the form and weights that a run had after a stage."""
    model = change_form(backend, model, folder.changes(upto))
    return backend.write(model, folder.weights(upto))


def change_form(backend: Backend, model: Model, decisions: Iterable[Decision]) -> Model:
    """Carry out what decisions change of a model's form: channels, fake quantization."""
    for decision in decisions:
        if isinstance(decision, PruneDecision):
            model = backend.remove_channels(model, decision)
        elif decision.kind == "quantize":
            model = backend.insert_quant(model, decision)
    return model


def find_backend(model: Model | None, name: str | None) -> Backend:
    """The backend of a model, or the one named, or the first installed; BackendError when they contradict."""
    if model is None:
        if name is None:
            return installed_backend()
        return get_backend(name)
    side = backend_of(model)
    if name is not None and name != side.name:
        raise BackendError(f"the model is a {side.name} model, the backend named is '{name}'")
    return side


def first_inputs(data: Data, count: int) -> tuple[Array, ...]:
    """Inputs of the first `count` test samples (fewer where there are fewer, or a loader's first batch is smaller)."""
    order = np.arange(min(count, len(data.test))) if isinstance(data.test, Split) else None
    inputs, _ = next(iter(batches(data.test, count, order)))
    return tuple(array[:count] for array in inputs)


def machine() -> str:
    """Processor architecture, cores, operating system, Python."""
    cores = os.cpu_count() or 1
    return f"{platform.machine()}, {cores} cores, {platform.system()}, Python {platform.python_version()}"


class _Run:
    """One run: the scene, the folder, and the model as it stands."""

    def __init__(self, scene: Scene, folder: RunFolder, start: Model, start_weights: Mapping[str, Array]) -> None:
        self.scene, self.folder = scene, folder
        self._start, self._start_weights = start, start_weights

    @classmethod
    def begin(cls, side: Backend, plan: Plan, given: Given, path: Path, resume: bool, progress: Progress) -> _Run:
        plan = with_defaults(plan)
        data = given.data or plan_data(plan)
        start = side.clone(given.model) if given.model is not None else build_model(plan, side)
        start = side.place(start, plan.device)
        weights = side.read(start)
        plan = _truthful(plan, given, side, weights)
        facts = {
            "backend": side.name,
            "slimbridge": __version__,
            "versions": dict(side.capabilities().versions),
            "machine": machine(),
            "input_digest": digest_of(weights),
            "data": data.name,
        }
        known = path / "run.json"
        folder = (
            RunFolder.resume(path, plan, facts) if resume and known.exists() else RunFolder.create(path, plan, facts)
        )
        scene = Scene(
            backend=side,
            plan=plan,
            data=data,
            metric=given.metric or metrics.get("accuracy"),
            progress=progress,
            example=first_inputs(data, 1),
            loss=given.loss,
            checkpoint=folder.checkpoint,
            teacher=lambda: rebuild(side, side.clone(start), folder, "00-baseline"),
        )
        return cls(scene, folder, start, weights)

    def run(self) -> tuple[Model, RunReport]:
        """All stages; those that are complete are read back."""
        names = stage_names(self.scene.plan)
        stages = (self.scene.plan.baseline, *self.scene.plan.stages)
        done = [name for name in names if self.folder.done(name)]
        model = self.scene.backend.clone(self._start)
        if done:
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
        outcome = run_stage(self.scene, name, stage, model)
        seconds = time.perf_counter() - started
        weights = backend.read(outcome.model)
        kind = "baseline" if isinstance(stage, BaselineSection) else stage.kind
        record = self._measure(outcome, index, kind, name, seconds, digest)
        probe = outputs_of(backend, outcome.model, first_inputs(self.scene.data, PROBE))
        self.folder.commit(name, StageResult(record, weights, outcome.decision, probe))
        self.scene.progress.say(f"{backend.name} {name}: {_summary(record)} ({plan.name})")
        return outcome.model

    def _measure(self, outcome: Outcome, index: int, kind: Any, name: str, seconds: float, digest: str) -> StageRecord:
        scene, backend = self.scene, self.scene.backend
        metric = evaluate(backend, outcome.model, scene.data.test, scene.metric, scene.progress)
        cost = cost_of(backend.trace(outcome.model, scene.example))
        return StageRecord(
            index=index,
            kind=kind,
            name=name,
            metric=metric,
            metric_before_training=outcome.metric_before_training,
            parameters=cost.parameters,
            macs=cost.macs,
            size_bytes=0,
            latency=measure_latency(backend, outcome.model, scene.example, scene.plan.device, kind == "quantize"),
            seconds=round(seconds, 2),
            input_digest=digest,
            decision_digest=outcome.decision.digest() if outcome.decision else None,
            epochs=outcome.epochs,
            notes=outcome.notes,
        )

    def _report(self, names: tuple[str, ...]) -> RunReport:
        facts = self.folder.facts()
        return RunReport(
            plan=self.scene.plan.name,
            backend=self.scene.backend.name,
            versions={"slimbridge": facts["slimbridge"], **facts["versions"]},
            machine=facts["machine"],
            device=self.scene.plan.device,
            metric_name=getattr(self.scene.metric, "__name__", "metric"),
            stages=tuple(self.folder.record(name) for name in names),
        )


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


def _as_data(data: Data | tuple[Any, Any] | None) -> Data | None:
    if data is None or isinstance(data, Data):
        return data
    if not isinstance(data, tuple) or len(data) != 2:
        raise RunError(f"data must be slimbridge.Data or a pair (train, test), found {type(data).__name__}")
    train, test = (_as_split(part) for part in data)
    return Data(train, test, name="own data")


def _as_split(part: Any) -> Any:
    """A pair of arrays is a split; anything else is an iterable of batches."""
    if isinstance(part, tuple) and len(part) == 2 and all(isinstance(array, np.ndarray) for array in part):
        inputs, targets = part
        return Split(np.asarray(inputs, np.float32), np.asarray(targets, np.int64))
    return part


__all__ = ["Given", "Result", "compress", "restore"]
