"""Does a run again on another backend, stage by stage, each from the reference's own weights.

Two runs diverge as soon as they train; decisions made from diverged weights differ and that proves nothing. A
replay takes the reference's weights before a stage, decides there, takes its weights after the stage and runs
them, so that what should be equal can be compared exactly.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from slimbridge.decisions import Decision, QuantizeDecision, decision_to_json
from slimbridge.discovery import get_backend
from slimbridge.distill import Distiller
from slimbridge.errors import RunError
from slimbridge.files import make_folder, write_file
from slimbridge.graph import cost_of
from slimbridge.onerun import digest_of_inputs, fingerprint, probe_inputs, rebuild
from slimbridge.parity.replay_records import Replay, ReplayStage
from slimbridge.plan import DistillStage, PruneStage, QuantizeStage, SparsifyStage
from slimbridge.plan.registries import ENTRY_IMPORTANCES, IMPORTANCES, as_importance
from slimbridge.ports import Backend, Model
from slimbridge.prune import Pruner
from slimbridge.prune.sparsifier import masks_in_force
from slimbridge.prune_stages import basis_for, decide_masks, replayable
from slimbridge.quantize.fold import fold_weights
from slimbridge.quantize.quantizer import integer_weights
from slimbridge.quantize_stage import calibration_inputs, decide_grids
from slimbridge.rehearse import EXAMPLE, first_inputs
from slimbridge.resolve import build_model, plan_data
from slimbridge.runfolder import RunFolder, save_probe, stage_names
from slimbridge.stages import Scene
from slimbridge.tasks import Data, Split, metrics
from slimbridge.train import Progress, Quiet, outputs_of
from slimbridge.weights import digest_of, save_weights


def replay(
    reference: Path,
    backend: str,
    output: Path,
    data: Data | None = None,
    model: Model | None = None,
    progress: Progress | None = None,
) -> Replay:
    """Replay a complete run.

    Args:
        reference: the run's folder.
        backend: name of the backend to replay on.
        output: folder of the replay; an old replay there is replaced.
        data: None takes the plan's.
        model: a fresh model of that backend; None builds the plan's.
        progress: who is told.

    Raises:
        SlimbridgeError: the reference is not complete, its model or data are unknown here, a file cannot be written.
    """
    job = _Replay(RunFolder(reference), get_backend(backend), output, data, model, progress or Quiet())
    return job.run()


class _Replay:
    def __init__(
        self,
        folder: RunFolder,
        backend: Backend,
        output: Path,
        data: Data | None,
        model: Model | None,
        progress: Progress,
    ) -> None:
        self.folder, self.backend, self.output, self.progress = folder, backend, output, progress
        self.model = model
        # The replay appears at its place when it is complete; what a killed one left is thrown away.
        self.part = output.with_name(f".{output.name}.part")
        self.plan = folder.plan()
        self.data = data or plan_data(self.plan)
        self.example = first_inputs(self.data, EXAMPLE)

    def run(self) -> Replay:
        names = stage_names(self.plan)
        self.folder.require_complete()
        self._require_its_own()
        self._fresh_output()
        self.progress.start(f"replaying {self.folder.path.name} on {self.backend.name}", len(names))
        stages = []
        for index, name in enumerate(names):
            stages.append(self._stage(index, name, names))
            self.progress.step(name)
        digest = self.folder.digest()
        result = Replay(backend=self.backend.name, reference_digest=digest, stages=tuple(stages))
        write_file(self.part / "replay.json", result.model_dump_json(indent=1))
        try:
            shutil.rmtree(self.output, ignore_errors=True)
            self.part.replace(self.output)
        except OSError as error:
            raise RunError(f"{self.output}: cannot be written: {error.strerror or error}") from error
        return result

    def _require_its_own(self) -> None:
        """RunError when the model is of another framework, or arrays are not those of the run."""
        if self.model is not None and not self.backend.owns(self.model):
            raise RunError(
                f"the model to replay on must be a {self.backend.name} model, found {type(self.model).__name__}"
            )
        known = self.folder.facts().get("data", {})
        for part, source in (("train", self.data.train), ("test", self.data.test)):
            if isinstance(source, (Split, list, tuple)) and known.get(part) != fingerprint(source):
                raise RunError(f"{self.folder.path}: the {part} data is not that of the run")

    def _fresh_output(self) -> None:
        if self.output.exists() and any(self.output.iterdir()) and not (self.output / "replay.json").exists():
            raise RunError(f"{self.output}: exists and is not a replay; name another folder")
        shutil.rmtree(self.part, ignore_errors=True)
        make_folder(self.part)

    def _model(self, upto: str) -> Model:
        fresh = build_model(self.plan, self.backend) if self.model is None else self.backend.clone(self.model)
        fresh = self.backend.place(fresh, self.plan.device)
        return rebuild(self.backend, fresh, self.folder, upto)

    def _stage(self, index: int, name: str, names: tuple[str, ...]) -> ReplayStage:
        here = self.part / name
        here.mkdir()
        decision = None
        if index:
            stage = self.plan.stages[index - 1]
            decision = self._decide(index, stage, self._model(names[index - 1]))
        if decision is not None:
            write_file(here / "decision.json", decision_to_json(decision))
        if isinstance(decision, QuantizeDecision):
            before = self.folder.weights(names[index - 1])
            folded = {**before, **fold_weights(before, decision.folds)}
            save_weights(here / "integers.safetensors", integer_weights(decision, folded))
        model = self._model(name)
        inputs = probe_inputs(self.backend, self.data, self.plan.seed)
        save_probe(here, outputs_of(self.backend, model, inputs), digest_of_inputs(inputs))
        macs = cost_of(self.backend.trace(model, self.example)).macs
        return ReplayStage(name=name, macs=macs, decided=decision is not None)

    def _decide(self, index: int, stage: Any, model: Model) -> Decision | None:
        if isinstance(stage, (PruneStage, SparsifyStage)):
            return self._prune(index, stage, model) if self._repeatable(stage) else None
        if isinstance(stage, QuantizeStage):
            return self._quantize(stage, model)
        if isinstance(stage, DistillStage) and stage.teacher.model == "baseline":
            teacher = self._model("00-baseline")
            digest = digest_of(self.backend.read(teacher))
            return Distiller(stage).decide(self.backend, model, teacher, digest, self.example)
        return None

    def _quantize(self, stage: QuantizeStage, model: Model) -> Decision | None:
        """None where training or another toolkit decided."""
        if stage.qat is not None or stage.engine == "native":
            return None
        inputs = calibration_inputs(self.backend, self.data, self.plan.seed, stage)
        return decide_grids(self.backend, model, stage, self.example, inputs)

    def _repeatable(self, stage: PruneStage | SparsifyStage) -> bool:
        """Not where the decision rests on what is not in the run's folder: a training, times, a user's loss."""
        registry: Any = IMPORTANCES if isinstance(stage, PruneStage) else ENTRY_IMPORTANCES
        entry = registry.get(stage.importance)
        needs = as_importance(entry).needs if isinstance(stage, PruneStage) else entry.needs
        return replayable(stage) and (needs == "weights" or self.folder.facts().get("loss") is None)

    def _prune(self, index: int, stage: PruneStage | SparsifyStage, model: Model) -> Decision:
        names = stage_names(self.plan)
        scene = Scene(
            backend=self.backend,
            plan=self.plan,
            data=self.data,
            metric=metrics.get("accuracy"),
            progress=Quiet(),
            example=self.example,
            loss=None,
            checkpoint=self.folder.checkpoint,
            teacher=partial(self._model, names[0]),
            file=self.folder.file,
            before=self.folder.before,
            decisions=tuple(self.folder.changes(names[index - 1])),
        )
        if isinstance(stage, SparsifyStage):
            return decide_masks(scene, stage, model, masks_in_force(scene.decisions))
        basis = basis_for(scene, stage, model, self.backend.trace(model, self.example))
        return Pruner(stage, basis).prune(self.backend, model, self.example)[1]
