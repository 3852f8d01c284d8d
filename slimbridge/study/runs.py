"""Runs every combination of a study on every backend, each in a process of its own, one after another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimbridge.discovery import get_backend
from slimbridge.errors import PlanError, RunError, SlimbridgeError
from slimbridge.files import locked, make_folder, write_file
from slimbridge.plan import Plan, load_plan, plan_to_yaml
from slimbridge.report.records import RunReport, read_report
from slimbridge.report.study_html import write_study_html
from slimbridge.report.study_records import Study, StudyRun, study_run
from slimbridge.resolve import with_defaults
from slimbridge.runfolder import stage_names
from slimbridge.study.process import run_process
from slimbridge.study.vary import Combination, combinations
from slimbridge.train import Progress, Quiet


@dataclass(frozen=True)
class _Task:
    """One run that is to be made: its plan, with its seed, its backend and its folder."""

    combination: Combination
    plan: Plan
    backend: str
    folder: Path


def run_study(
    plan: str | Path | Mapping[str, Any] | Plan,
    vary: Mapping[str, Sequence[Any]] | None = None,
    *,
    backends: Sequence[str],
    output: str | Path,
    seeds: Sequence[int] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> Study:
    """Run a plan with some of its values varied: every combination of them on every backend with every seed.

    Each run has a folder `<output>/<combination>/<backend>`. Runs whose plans agree in all but their stages share one
    trained baseline: that of the first of them, on the first backend.

    Args:
        plan: a shipped plan's name, a path, a mapping or a `Plan`; it must name model and data.
        vary: path in the plan, such as `stages[0].importance` -> at least two values.
        backends: their names.
        output: folder that gets the runs' folders, study.json and report.html.
        seeds: each takes the place of the plan's seed and of that of the model's initial weights; the report shows
            mean and spread over them. None keeps the plan's.
        resume: keep the runs that are complete and go on with those that are not.
        progress: who is told; None is quiet.

    Returns:
        the study; a run that failed does not stop the others, and is there with the line it failed with.

    Raises:
        SlimbridgeError: a mistake in what was asked for, before anything runs; or the folder holds something else.
    """
    loaded, folder, told = load_plan(plan), Path(output), progress or Quiet()
    tasks = list(_tasks(loaded, vary or {}, backends, folder, seeds))
    if folder.exists() and not resume and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists and is not empty; resume it, or name another folder")
    make_folder(folder)
    with locked(folder / ".lock"):
        found = _run_all(loaded, tasks, folder, told)
        write_study_html(folder / "report.html", found)
    return found


def _tasks(
    plan: Plan, vary: Mapping[str, Sequence[Any]], backends: Sequence[str], folder: Path, seeds: Sequence[int]
) -> Iterator[_Task]:
    _check(plan, vary, backends, seeds)
    for combination in combinations(plan, vary):
        for seed in seeds or (None,):
            seeded = combination.plan if seed is None else _seeded(combination.plan, seed)
            name = combination.name if seed is None else f"{combination.name}-seed{seed}"
            for backend in backends:
                yield _Task(combination, seeded, backend, folder / name / backend)


def _check(plan: Plan, vary: Mapping[str, Any], backends: Sequence[str], seeds: Sequence[int]) -> None:
    if plan.model is None or plan.data is None:
        raise PlanError([f"plan '{plan.name}': a study's plan must name its model and its data"])
    for word, given in (("backend", backends), ("seed", seeds)):
        if len(set(given)) < len(given):
            raise SlimbridgeError(f"{word}s: one is named twice: {', '.join(map(str, given))}")
    if not backends:
        raise SlimbridgeError("backends: none is named")
    if not vary and len(seeds) < 2:
        raise SlimbridgeError("nothing to vary: a study needs values to vary, or several seeds")
    if seeds and {"seed", "model.seed"} & vary.keys():
        raise SlimbridgeError("seeds: they are varied by a path too; give one of the two")
    for name in backends:
        get_backend(name)  # a framework that is not installed is said before the first one trains


def _seeded(plan: Plan, seed: int) -> Plan:
    """The plan with a seed of data order, calibration and initial weights; PlanError when it is not allowed."""
    content = plan.model_dump()
    content["seed"] = seed
    content["model"]["seed"] = seed
    return load_plan(content)


def _run_all(plan: Plan, tasks: Sequence[_Task], folder: Path, told: Progress) -> Study:
    found = Study(plan=plan.name)
    baselines: dict[str, Path] = {}
    told.start(f"study of {plan.name}", len(tasks))
    for task in tasks:
        error = None
        if _report(task) is None:
            error = _run(task, baselines, told)
        weights = task.folder / stage_names(task.plan)[0] / "weights.safetensors"
        if weights.is_file():
            baselines.setdefault(_start(task.plan), weights)
        found = _with(found, task, folder, error)
        write_file(folder / "study.json", found.model_dump_json(indent=1))
        told.step(task.combination.name)
    return found


def _with(found: Study, task: _Task, folder: Path, error: str | None) -> Study:
    report = _report(task) if error is None else None
    given: dict[str, Any] = {
        "combination": task.combination.name,
        "values": task.combination.values,
        "seed": task.plan.seed,
        "folder": str(task.folder.relative_to(folder)),
    }
    if report is None:
        error = error or "left no report"
        return found.model_copy(update={"runs": (*found.runs, StudyRun(**given, backend=task.backend, error=error))})
    changes = {"metric_name": report.metric_name, "metric_is_share": report.metric_is_share}
    return found.model_copy(update={**changes, "runs": (*found.runs, study_run(report, **given))})


def _report(task: _Task) -> RunReport | None:
    """The report of a complete run; None when there is none, or it is of other stages."""
    try:
        report = read_report(task.folder / "report.json")
        of_this_plan = load_plan(task.folder.parent / "plan.yaml") == task.plan
    except SlimbridgeError:
        return None
    names = tuple(stage.name for stage in report.stages)
    return report if of_this_plan and names == stage_names(with_defaults(task.plan)) else None


def _run(task: _Task, baselines: Mapping[str, Path], told: Progress) -> str | None:
    """Run it; the line it failed with, if it did."""
    name = f"{task.folder.parent.name} on {task.backend}"
    told.say(f"{name}:")
    try:
        make_folder(task.folder.parent)
        plan = _keep_plan(task.folder.parent / "plan.yaml", task.plan)
        weights = _baseline(task, baselines)
    except SlimbridgeError as error:
        return str(error).replace("\n", "; ")
    arguments = ["run", str(plan), "--backend", task.backend, "--output", str(task.folder), "--resume"]
    error_line = run_process([*arguments, *(["--baseline", str(weights)] if weights else [])], told.say)
    if error_line is not None:
        told.say(f"{name}: failed; the study goes on")
    return error_line


def _keep_plan(path: Path, plan: Plan) -> Path:
    """Write the plan of the runs beside it; RunError when another one lies there."""
    if path.exists():
        if load_plan(path) != plan:
            raise RunError(f"{path}: holds another plan, from an earlier study; name another folder")
    else:
        write_file(path, plan_to_yaml(plan))
    return path


def _baseline(task: _Task, baselines: Mapping[str, Path]) -> Path | None:
    """Weights that the run starts from in place of training its baseline: those that it began with, or shared ones."""
    if (task.folder / "plan.yaml").is_file():
        began = load_plan(task.folder / "plan.yaml").baseline.weights
        return Path(began) if began is not None and began != task.plan.baseline.weights else None
    return baselines.get(_start(task.plan)) if task.plan.baseline.train is not None else None


def _start(plan: Plan) -> str:
    """What a baseline depends on."""
    return json.dumps(plan.model_dump(mode="json", exclude={"name", "backend", "stages"}), sort_keys=True)
