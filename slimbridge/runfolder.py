"""A run's folder: what is in it, and how it stays whole when the run is killed.

::

    plan.yaml            the plan with every default
    run.json             backend, versions, machine, the weights that the run started from
    00-baseline/         weights.safetensors, record.json, probe.safetensors
    01-prune/            the same, and decision.json
    ...
    checkpoint-01-prune.safetensors    of the training that is under way
    report.json          once all stages are done

A stage's folder appears at once, by renaming, when the stage is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge.decisions import Decision, DistillDecision, QuantizeDecision, decision_to_json, load_decision
from slimbridge.errors import RunError
from slimbridge.files import write_file
from slimbridge.plan import Plan, load_plan, plan_to_yaml
from slimbridge.ports import Array
from slimbridge.report.records import RunReport, StageRecord
from slimbridge.weights import load_stored, load_weights, save_weights


@dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves.

    Attributes:
        record: its row of the report.
        weights: canonical name -> real values.
        decision: what it decided, None for training alone.
        probe: the model's outputs on the probe batch.
    """

    record: StageRecord
    weights: Mapping[str, Array]
    decision: Decision | None
    probe: Array


def stage_names(plan: Plan) -> tuple[str, ...]:
    """Folder names of the baseline and of each stage, e.g. "00-baseline", "01-prune"."""
    return ("00-baseline", *(f"{index:02d}-{stage.kind}" for index, stage in enumerate(plan.stages, start=1)))


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, plan: Plan, facts: Mapping[str, Any]) -> RunFolder:
        """Begin a run in an empty or new folder.

        Raises:
            RunError: the folder holds something already, or cannot be written.
        """
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise RunError(f"{path}: exists and is not empty; resume it, or name another folder")
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be made: {error.strerror or error}") from error
        write_file(path / "plan.yaml", plan_to_yaml(plan))
        write_file(path / "run.json", json.dumps(dict(facts), indent=1, sort_keys=True))
        return cls(path)

    @classmethod
    def resume(cls, path: Path, plan: Plan, facts: Mapping[str, Any]) -> RunFolder:
        """Open a run to go on with it.

        Raises:
            RunError: it was made from another plan, another backend or other starting weights.
        """
        folder = cls(path)
        old = folder.plan().model_dump(mode="json")
        new = plan.model_dump(mode="json")
        changed = [key for key in new if new[key] != old.get(key)]
        if changed:
            raise RunError(f"{path}: cannot be resumed: its plan differs in {', '.join(changed)}; name another folder")
        known = folder.facts()
        for key in ("backend", "input_digest", "data"):
            if known.get(key) != facts.get(key):
                raise RunError(f"{path}: cannot be resumed: {key} was '{known.get(key)}', is now '{facts.get(key)}'")
        return folder

    def plan(self) -> Plan:
        """The plan that the run was made from."""
        return load_plan(self.path / "plan.yaml") if self._is_run() else load_plan({})

    def facts(self) -> dict[str, Any]:
        """run.json; RunError when it is missing or damaged."""
        self._is_run()
        try:
            return dict(json.loads((self.path / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'run.json'}: cannot be read: {error}") from error

    def _is_run(self) -> bool:
        if not (self.path / "plan.yaml").is_file() or not (self.path / "run.json").is_file():
            raise RunError(f"{self.path}: not a run folder (it has no plan.yaml and run.json)")
        return True

    def checkpoint(self, name: str) -> Path:
        """Checkpoint of a stage's training, there only while it is under way."""
        return self.path / f"checkpoint-{name}.safetensors"

    def done(self, name: str) -> bool:
        """Is the stage complete?"""
        return (self.path / name).is_dir()

    def commit(self, name: str, result: StageResult) -> None:
        """Make a stage complete; what it needed under way is removed.

        Raises:
            RunError: a file cannot be written; the stage is then not complete and nothing else is touched.
        """
        work = self.path / f".{name}.part"
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir()
            decision = result.decision
            quantize = decision if isinstance(decision, QuantizeDecision) else None
            save_weights(work / "weights.safetensors", result.weights, quantize)
            size = (work / "weights.safetensors").stat().st_size
            record = result.record.model_copy(update={"size_bytes": size})
            write_file(work / "record.json", record.model_dump_json(indent=1))
            save_weights(work / "probe.safetensors", {"output": result.probe})
            if decision is not None:
                write_file(work / "decision.json", decision_to_json(decision))
            os.replace(work, self.path / name)
        except OSError as error:
            raise RunError(f"{self.path / name}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self.checkpoint(name).unlink(missing_ok=True)

    def record(self, name: str) -> StageRecord:
        """The row of a complete stage."""
        path = self.path / name / "record.json"
        try:
            return StageRecord.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error

    def weights(self, name: str) -> dict[str, Array]:
        """The real weights after a complete stage."""
        return load_weights(self.path / name / "weights.safetensors")

    def integers(self, name: str) -> dict[str, Array]:
        """The int8 weights of a complete stage, as stored."""
        stored = load_stored(self.path / name / "weights.safetensors")
        return {key: array for key, array in stored.items() if array.dtype == np.int8}

    def probe(self, name: str) -> Array:
        """The model's outputs on the probe batch after a complete stage."""
        return load_stored(self.path / name / "probe.safetensors")["output"]

    def decision(self, name: str) -> Decision | None:
        """What a complete stage decided."""
        path = self.path / name / "decision.json"
        return load_decision(path) if path.exists() else None

    def changes(self, upto: str) -> list[Decision]:
        """The decisions that change a model's form, of the complete stages up to and including one, in order."""
        names = [name for name in stage_names(self.plan()) if name <= upto]
        found = [self.decision(name) for name in names]
        return [decision for decision in found if decision is not None and not isinstance(decision, DistillDecision)]

    def write_report(self, report: RunReport) -> None:
        """Write report.json."""
        write_file(self.path / "report.json", report.model_dump_json(indent=1))
