"""Exports a run's model: each form is written aside, read back, compared, and only then put in its place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge.decisions import QuantizeDecision, Site
from slimbridge.deploy.onnx_file import write_onnx
from slimbridge.deploy.onnx_run import open_runtime
from slimbridge.deploy.trust import objection
from slimbridge.discovery import get_backend
from slimbridge.errors import BackendError, ModelError, RunError, SlimbridgeError, listed, nearest
from slimbridge.files import locked, make_folder, write_file
from slimbridge.onerun import PROBE, rebuild
from slimbridge.parity.measure import relative
from slimbridge.ports import Array, Backend, Model, tensors_in
from slimbridge.quantize.fake import Recorder
from slimbridge.rehearse import first_inputs
from slimbridge.report.deploy_records import Exported, Which
from slimbridge.resolve import build_model, plan_data
from slimbridge.runfolder import RunFolder, stage_names
from slimbridge.tasks import Data
from slimbridge.tasks.own import as_data
from slimbridge.train import Progress, Quiet

ONNX = "onnx"
FLOAT = "_float"
"""What the names of the forms end in that hold no integers."""
ONNX_FLOAT = ONNX + FLOAT
"""A backend's form that "onnx" is made of."""
Runner = Callable[[Sequence[Array]], list[Array]]


@dataclass
class Exporter:
    """The exports of one complete run.

    Args:
        path: the run's folder.
        model: a fresh model of the run's framework, where the plan names none.
        data: as for `compress`, where the plan names none.

    Raises:
        RunError: it is no complete run, or the model is not of its architecture.
    """

    path: Path
    model: Model | None = None
    data: Data | tuple[Any, Any] | None = None
    _models: dict[Which, Model] = field(default_factory=dict)
    _expected: dict[Which, list[Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._data = as_data(self.data)
        self.folder = RunFolder(self.path)
        self.folder.require_complete()
        self.plan = self.folder.plan()
        self.backend: Backend = get_backend(str(self.folder.facts()["backend"]))
        if self.model is not None and not self.backend.owns(self.model):
            raise RunError(f"the model must be a {self.backend.name} model, found {type(self.model).__name__}")

    @cached_property
    def samples(self) -> list[tuple[Array, ...]]:
        """Inputs of single samples that exports are compared on."""
        inputs = first_inputs(self._data or plan_data(self.plan), PROBE)
        return [tuple(array[i : i + 1] for array in inputs) for i in range(len(inputs[0]))]

    @cached_property
    def decision(self) -> QuantizeDecision | None:
        """The grids of the run's last stage; None when it did not quantize."""
        found = self.folder.decision(stage_names(self.plan)[-1])
        return found if isinstance(found, QuantizeDecision) else None

    def forms(self) -> tuple[str, ...]:
        """What can be exported of the compressed model here."""
        own = self.backend.capabilities().forms
        mine = [form for form in own if not form.endswith(FLOAT)] if self.decision is not None else []
        return (*([ONNX] if ONNX_FLOAT in own else []), *mine)

    def model_of(self, which: Which) -> Model:
        """The run's baseline, or the model after its last stage, fake quantization included; not to be changed."""
        if which not in self._models:
            names = stage_names(self.plan)
            fresh = self._fresh() if self.model is None else self.backend.clone(self.model)
            self._models[which] = rebuild(
                self.backend, fresh, self.folder, names[0] if which == "baseline" else names[-1]
            )
        return self._models[which]

    def _fresh(self) -> Model:
        if self.plan.model is None:
            raise RunError(
                f"{self.path}: the plan names no model, it was given; give a fresh one, in Python:\n"
                "sb.export(run, model=MyNet(), data=(train, test)), and sb.bench likewise"
            )
        return build_model(self.plan, self.backend)

    def expected(self, which: Which) -> list[Array]:
        """The model's own outputs on each sample, all outputs flattened and joined."""
        if which not in self._expected:
            model = self.model_of(which)
            self._expected[which] = [joined(self._outputs(model, sample)) for sample in self.samples]
        return self._expected[which]

    def _outputs(self, model: Model, sample: Sequence[Array]) -> list[Array]:
        found = tensors_in(self.backend.forward(model, sample).output)
        return [self.backend.ops.numpy(tensor) for tensor in found]

    def place(self, form: str, which: Which) -> Path:
        """Where an export is."""
        return self.path / "exports" / (f"baseline-{form}" if which == "baseline" else form)

    def export(self, form: str, which: Which = "compressed") -> Exported:
        """Write one form, read it back, compare it, and put it in the place of an older one.

        Raises:
            SlimbridgeError: the form is unknown, cannot be written here, or its outputs are not the model's; what was
                written is then deleted, and an older export stays.
        """
        target = self.place(form, which)
        make_folder(target.parent)
        part = target.with_name(f".{target.name}.part")
        try:
            with locked(self.path / ".lock"):
                return self._replaced(form, which, part, target)
        except OSError as error:
            raise RunError(f"{target}: cannot be written: {error.strerror or error}") from error

    def _replaced(self, form: str, which: Which, part: Path, target: Path) -> Exported:
        shutil.rmtree(part, ignore_errors=True)  # what a killed export left
        try:
            part.mkdir()
            notes = self._write(form, which, part)
            record = self._checked(form, which, part, target, notes)
            write_file(part / "export.json", record.model_dump_json(indent=1))
            shutil.rmtree(target, ignore_errors=True)
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return record

    def _write(self, form: str, which: Which, folder: Path) -> tuple[str, ...]:
        decision = self.decision if which == "compressed" else None
        if form == ONNX:
            return self._write_onnx(decision, which, folder)
        known = [name for name in self.backend.capabilities().forms if name != ONNX_FLOAT]
        if form not in known:
            allowed = [*self.forms(), *(name for name in known if name.endswith(FLOAT))]
            raise BackendError(
                f"{self.backend.name} exports no '{form}'{nearest(form, allowed)}; it has: {listed(allowed)}"
            )
        if decision is None and not form.endswith(FLOAT):
            raise RunError(f"'{form}' holds integers, and the run's last stage does not quantize; allowed: onnx")
        plain = self._without_quant(which)
        self.backend.export(plain, self.samples[0], folder, form, decision)
        return ()

    def _write_onnx(self, decision: QuantizeDecision | None, which: Which, folder: Path) -> tuple[str, ...]:
        plain = self._without_quant(which)
        self.backend.export(plain, self.samples[0], folder, ONNX_FLOAT, None)
        sites = self._site_values(plain, decision) if decision is not None else {}
        weights = self.backend.read(plain)
        return write_onnx(folder / "model.onnx", decision, weights, sites, self.samples[0])

    def _without_quant(self, which: Which) -> Model:
        """A copy of a model that computes in float, its weights on their grids."""
        return self.backend.insert_quant(self.backend.clone(self.model_of(which)), {})

    def _site_values(self, model: Model, decision: QuantizeDecision) -> dict[str, Array]:
        """The value of each tensor that has a grid, on the first sample, of the model without fake quantization."""
        recorders = {key: Recorder() for key in (*decision.activations, *decision.dynamic)}
        watched = self.backend.insert_quant(
            self.backend.clone(model), {Site.parse(key): recorder for key, recorder in recorders.items()}
        )
        self.backend.forward(watched, self.samples[0])
        return {key: recorder.value for key, recorder in recorders.items() if recorder.value is not None}

    def runner(self, form: str, folder: Path, runtime: str, threads: int, optimise: bool = True) -> Runner:
        """What runs an export: an ONNX runtime by its name, or the framework's own for its own forms."""
        if form == ONNX:
            return open_runtime(folder / "model.onnx", runtime, threads, optimise)
        return self.backend.load_exported(folder, form, threads)

    def _checked(self, form: str, which: Which, part: Path, target: Path, notes: tuple[str, ...]) -> Exported:
        run = self.runner(form, part, "onnxruntime", 1, optimise=False)
        difference, agreement = self.compare(run, which)
        wrong = objection(difference, agreement, "export" if form == ONNX else "export_runtime")
        if wrong is not None:
            raise ModelError(f"export '{form}': {wrong};\nit was deleted")
        return Exported(
            form=form,
            of=which,
            folder=str(target.relative_to(self.path)),
            size_bytes=sum(file.stat().st_size for file in part.rglob("*") if file.is_file()),
            integer=which == "compressed" and self.decision is not None and not form.endswith(FLOAT),
            difference=difference,
            agreement=agreement,
            samples=len(self.samples),
            compared_in=runtime_name(form, self.backend),
            notes=notes,
        )

    def compare(self, run: Runner, which: Which) -> tuple[float, float | None]:
        """Relative L2 difference from the model's own outputs, and the share of samples with the same largest one.

        Raises:
            ModelError: the outputs have other shapes, or the runtime fails on them.
        """
        ours = self.expected(which)
        theirs = [joined(run(sample)) for sample in self.samples]
        if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
            raise ModelError(f"its outputs have {theirs[0].size} entries a sample, the model's {ours[0].size}")
        difference = relative(np.stack(theirs), np.stack(ours))
        votes = len(self._outputs(self.model_of(which), self.samples[0])[0].shape) == 2 and ours[0].size > 1
        same = [bool(a.argmax() == b.argmax()) for a, b in zip(ours, theirs, strict=True)]
        return difference, float(np.mean(same)) if votes else None


def joined(outputs: Sequence[Array]) -> Array:
    """All outputs of a pass as one vector."""
    return np.concatenate([np.asarray(output, np.float64).ravel() for output in outputs])


def runtime_name(form: str, backend: Backend) -> str:
    """Where an export is compared: name and how."""
    if form == ONNX:
        return "onnxruntime, graph optimisation off"
    return backend.capabilities().runtimes.get(form, backend.name)


def export(
    run_dir: str | Path,
    forms: str | Sequence[str] = (),
    *,
    model: Model | None = None,
    data: Data | tuple[Any, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Exported, ...]:
    """Export the compressed model of a complete run into its folder `exports`.

    Args:
        run_dir: the run's folder.
        forms: "onnx", or one or several forms of the framework's own; empty for all that can be written here.
        model: a fresh, uncompressed model of the run's framework, where the plan names none.
        data: as for `compress`, where the plan names none; its first test samples are what exports are compared on.
        progress: who is told, of forms that were not named and cannot be written too.

    Raises:
        SlimbridgeError: a form that was named, or all there are, cannot be written or is not true to the model; what
            was exported before it stays.
    """
    exporter = Exporter(Path(run_dir), model, data)
    if any(not isinstance(form, str) for form in forms):
        raise RunError(f"forms are words such as '{ONNX}', found {listed(map(str, forms))}")
    shown = progress or Quiet()
    forms = (forms,) if isinstance(forms, str) else forms
    wanted = tuple(forms) or exporter.forms()
    if not wanted:
        raise BackendError("nothing can be exported here; pip install 'slimbridge[deploy]'")
    exporter.model_of("compressed")  # a model that is missing or another's is no form's fault
    done: list[Exported] = []
    failed: list[SlimbridgeError] = []
    for form in wanted:
        shown.start(f"exporting {form}", 1)
        try:
            done.append(exporter.export(form))
        except SlimbridgeError as error:
            failed.append(error)
            if forms:
                raise
            shown.say(f"{form}: not written: {' '.join(str(error).split())}")
    if failed and not done:
        raise failed[0]
    return tuple(done)
