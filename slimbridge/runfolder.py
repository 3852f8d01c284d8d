"""A run's folder: what is in it, and how it stays whole when the run is killed.

::

    plan.yaml            the plan with every default
    run.json             backend, versions, machine, the weights that the run started from
    00-baseline/         weights.safetensors, record.json, probe.safetensors
    01-prune/            the same, and decision.json
    ...
    start.safetensors    the weights that the run starts from, until its first stage is complete
    checkpoint-01-prune.safetensors    of the training that is under way
    under-way/           what else the stage under way keeps: measured sensitivity curves, a choice by measured times
    report.json          once all stages are done
    exports/             one folder for each exported form, baseline-<form> for those of the baseline
    bench.json           times of the exported forms

A stage's folder appears at once, by renaming, when the stage is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge.decisions import Decision, DistillDecision, QuantizeDecision, decision_to_json, load_decision
from slimbridge.errors import RunError
from slimbridge.files import locked, make_folder, write_file
from slimbridge.plan import Plan, load_plan, plan_to_yaml
from slimbridge.ports import Array, Backend, Model
from slimbridge.report.deploy_records import Deployment
from slimbridge.report.records import RunReport, StageRecord
from slimbridge.weights import digest_of, load_stored, load_weights, save_weights

PROBE_FILE = "probe.safetensors"
UNDER_WAY = "under-way"
START = "start.safetensors"
"""The weights that a run starts from; gone when its first stage is complete."""


@dataclass(frozen=True)
class StageResult:
    """What a finished stage leaves.

    Attributes:
        record: its row of the report.
        weights: canonical name -> real values.
        decision: what it decided, None for training alone.
        probe: the model's outputs on the probe batch.
        probe_digest: digest of that batch.
    """

    record: StageRecord
    weights: Mapping[str, Array]
    decision: Decision | None
    probe: Array
    probe_digest: str = ""


def stage_names(plan: Plan) -> tuple[str, ...]:
    """Folder names of the baseline and of each stage, e.g. "00-baseline", "01-prune"."""
    return ("00-baseline", *(f"{index:02d}-{stage.kind}" for index, stage in enumerate(plan.stages, start=1)))


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, plan: Plan, facts: Mapping[str, Any], weights: Mapping[str, Array]) -> RunFolder:
        """Begin a run in an empty or new folder, with the weights that it starts from.

        What a run that was killed in its first moments left is taken as empty.

        Raises:
            RunError: the folder holds something already, or cannot be written.
        """
        try:
            if path.exists() and (not path.is_dir() or any(not _beginning(file) for file in path.iterdir())):
                raise RunError(f"{path}: exists and is not empty; resume it, or name another folder")
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{path}: cannot be made: {error.strerror or error}") from error
        save_weights(path / START, weights)
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
        if known.get("backend") != facts["backend"]:
            raise RunError(f"{path}: cannot be resumed on {facts['backend']}: it was begun on {known.get('backend')}")
        for key in ("model", "data", "loss", "metric"):
            if known.get(key) != facts[key]:
                raise RunError(f"{path}: cannot be resumed: the {key} is not the one that it began with")
        return folder

    @classmethod
    def reopen(cls, path: Path, plan: Plan, facts: Mapping[str, Any]) -> RunFolder | None:
        """Open a run to go on with it; None when it does not fit but has trained nothing, and was removed.

        Raises:
            RunError: as `resume`, or another process works in the folder.
        """
        try:
            return cls.resume(path, plan, facts)
        except RunError:
            with locked(path / ".lock"):
                if cls(path)._remove_if_untrained():
                    return None
            raise

    def _remove_if_untrained(self) -> bool:
        """Remove a run that has trained nothing yet, so that it can begin anew, with a mended loss for one."""
        trained = [name for name in self.complete_stages() if self.record(name).epochs or self.record(name).index]
        if trained or any(self.path.glob("checkpoint-*")):
            return False
        for name in (stage_names(self.plan())[0], UNDER_WAY):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("run.json", "plan.yaml", START):
            (self.path / name).unlink(missing_ok=True)
        return True

    def restart(self, backend: Backend, model: Model) -> Model:
        """The model with the weights that the run started from, while they are still needed."""
        path = self.path / START
        return backend.write(model, load_weights(path)) if path.exists() else model

    def plan(self) -> Plan:
        """The plan that the run was made from."""
        return load_plan(self.path / "plan.yaml") if self._is_run() else load_plan({})

    def facts(self) -> dict[str, Any]:
        """run.json; RunError when it is missing or damaged."""
        self._is_run()
        try:
            facts = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'run.json'}: cannot be read: {error}") from error
        if not isinstance(facts, dict) or not {"backend", "slimbridge", "versions", "machine"} <= facts.keys():
            raise RunError(f"{self.path / 'run.json'}: not the facts of a run")
        return facts

    def _is_run(self) -> bool:
        if not (self.path / "plan.yaml").is_file() or not (self.path / "run.json").is_file():
            inner = sorted(path.parent.name for path in self.path.glob("*/run.json"))
            hint = f"; it holds the runs {', '.join(inner)}: name one of them" if inner else ""
            raise RunError(f"{self.path}: not a run folder (it has no plan.yaml and run.json){hint}")
        return True

    def checkpoint(self, name: str) -> Path:
        """Checkpoint of a stage's training, there only while it is under way."""
        return self.path / f"checkpoint-{name}.safetensors"

    def file(self, name: str) -> Path:
        """A file that a stage keeps while it is under way, in a folder that is gone when the stage is complete."""
        folder = self.path / UNDER_WAY
        make_folder(folder)
        return folder / name

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
            digest = digest_of(load_weights(work / "weights.safetensors"))
            record = result.record.model_copy(update={"size_bytes": size, "weights_digest": digest})
            write_file(work / "record.json", record.model_dump_json(indent=1))
            save_probe(work, result.probe, result.probe_digest)
            if decision is not None:
                write_file(work / "decision.json", decision_to_json(decision))
            os.replace(work, self.path / name)
        except OSError as error:
            raise RunError(f"{self.path / name}: cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        self.tidy(name)
        (self.path / START).unlink(missing_ok=True)

    def tidy(self, name: str) -> None:
        """Remove what a complete stage needed under way; a kill may have come before."""
        for file in (*self.path.glob(f"checkpoint-{name}*"), *self.path.glob(f"{UNDER_WAY}/*-{name}.json")):
            file.unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or the next stage has begun
            (self.path / UNDER_WAY).rmdir()

    def record(self, name: str) -> StageRecord:
        """The row of a complete stage."""
        path = self.path / name / "record.json"
        try:
            return StageRecord.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error

    def weights(self, name: str) -> dict[str, Array]:
        """The real weights after a complete stage; RunError when they are not those that it ended with."""
        path = self.path / name / "weights.safetensors"
        weights = load_weights(path)
        if digest_of(weights) != self.record(name).weights_digest:
            raise RunError(f"{path}: damaged or changed: its digest is not the one in record.json")
        return weights

    def integers(self, name: str) -> dict[str, Array]:
        """The int8 weights of a complete stage, as stored."""
        stored = load_stored(self.path / name / "weights.safetensors")
        return {key: array for key, array in stored.items() if array.dtype == np.int8}

    def probe(self, name: str) -> tuple[Array, str]:
        """The model's outputs on the probe batch after a complete stage, and that batch's digest."""
        return load_probe(self.path / name)

    def decision(self, name: str) -> Decision | None:
        """What a complete stage decided; RunError when the file is not what it wrote."""
        path, expected = self.path / name / "decision.json", self.record(name).decision_digest
        found = load_decision(path) if path.exists() or expected is not None else None
        if (found.digest() if found is not None else None) != expected:
            raise RunError(f"{path}: damaged or changed: its digest is not the one in record.json")
        return found

    def complete_stages(self) -> tuple[str, ...]:
        """Names of the complete stages; RunError when one is missing before another that is there."""
        names = stage_names(self.plan())
        done = tuple(name for name in names if self.done(name))
        if done != names[: len(done)]:
            gone = next(name for name in names if name not in done)
            raise RunError(f"{self.path}: stage {gone} is gone though {done[-1]} is there; the run cannot be used")
        return done

    def require_complete(self) -> None:
        """RunError unless every stage is there."""
        missing = stage_names(self.plan())[len(self.complete_stages()) :]
        if missing:
            raise RunError(f"{self.path}: not complete: {', '.join(missing)} missing; resume it first")

    def digest(self) -> str:
        """Digest of all that a complete run made: weights and decisions of each stage, checked."""
        parts = []
        for name in self.complete_stages():
            decision = self.decision(name)
            parts += [name, digest_of(self.weights(name)), decision.digest() if decision else ""]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def changes(self, upto: str) -> list[Decision]:
        """The decisions that change a model's form, of the complete stages up to and including one, in order."""
        names = stage_names(self.plan())
        found = [self.decision(name) for name in names[: names.index(upto) + 1] if self.done(name)]
        return [decision for decision in found if decision is not None and not isinstance(decision, DistillDecision)]

    def before(self, index: int | str) -> tuple[dict[str, tuple[int, ...]], dict[str, float] | None]:
        """Shapes of the parameters after a complete stage, and what the model cost then; nothing for "current".

        Args:
            index: number of the stage, 0 is the baseline; or "current".
        """
        if not isinstance(index, int):
            return {}, None
        name = stage_names(self.plan())[index]
        record = self.record(name)
        shapes = {key: tuple(array.shape) for key, array in self.weights(name).items()}
        costs = {"parameters": record.parameters, "macs": record.macs, "latency": record.latency.median_ms}
        return shapes, costs

    def deployment(self) -> Deployment | None:
        """What was measured of the exported forms, None before; RunError when bench.json is damaged."""
        path = self.path / "bench.json"
        if not path.exists():
            return None
        try:
            return Deployment.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error

    def write_deployment(self, deployment: Deployment) -> None:
        """Write bench.json."""
        write_file(self.path / "bench.json", deployment.model_dump_json(indent=1))

    def write_report(self, report: RunReport) -> None:
        """Write report.json."""
        write_file(self.path / "report.json", report.model_dump_json(indent=1))


def save_probe(folder: Path, output: Array, digest: str) -> None:
    """Write a model's outputs on the probe batch and the batch's digest."""
    save_weights(folder / PROBE_FILE, {"output": output, "inputs": np.frombuffer(digest.encode(), np.uint8)})


def load_probe(folder: Path) -> tuple[Array, str]:
    """What `save_probe` wrote; RunError when it is damaged."""
    stored = load_stored(folder / PROBE_FILE)
    if not {"output", "inputs"} <= stored.keys():
        raise RunError(f"{folder / PROBE_FILE}: damaged: it has no outputs and inputs")
    return stored["output"], stored["inputs"].tobytes().decode(errors="replace")


def _beginning(file: Path) -> bool:
    """Is it what `create` leaves when it is killed before run.json is there?"""
    is_start = file.name in (START, ".lock") or file.name.startswith((f".{START}.", ".plan.yaml.", ".run.json."))
    own_plan = file.name == "plan.yaml" and (file.parent / START).exists()
    return is_start or own_plan
