"""One plan on several backends, each in a process of its own, and the comparison of what they gave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from slimbridge.discovery import get_backend
from slimbridge.errors import RunError
from slimbridge.files import make_folder, write_file
from slimbridge.parity import compare
from slimbridge.parity.replay_records import read_replay
from slimbridge.plan import Plan, load_plan, plan_to_yaml
from slimbridge.ports import Model
from slimbridge.replay import replay
from slimbridge.report.html import write_html
from slimbridge.report.records import Comparison, Verdict, read_report
from slimbridge.runfolder import RunFolder, stage_names
from slimbridge.tasks import Data

NOT_IN_PLAN = (
    "the plan names no model or no data, so the run cannot be replayed by itself: "
    "slimbridge.compare_runs takes a fresh model and the data"
)


def run_several(plan: Plan, backends: Sequence[str], output: Path, resume: bool) -> Comparison:
    """Run a plan on each backend; the first one's baseline weights start the others.

    Args:
        plan: it must name model and data.
        backends: names, the reference first.
        output: folder that gets one run folder for each backend, comparison.json and report.html.
        resume: go on with what is there.

    Raises:
        RunError: a run failed; its message has been printed by its own process.
    """
    for name in backends:
        get_backend(name)  # a framework that is not installed is said before the first one trains
    if output.exists() and not resume and any(output.iterdir()):
        raise RunError(f"{output}: exists and is not empty; resume it, or name another folder")
    make_folder(output)
    _keep_plan(output / "plan.yaml", plan)
    reference = output / backends[0]
    for name in backends:
        arguments = ["run", str(output / "plan.yaml"), "--backend", name, "--output", str(output / name), "--resume"]
        if name != backends[0]:
            arguments += ["--baseline", str(reference / stage_names(plan)[0] / "weights.safetensors")]
        _process(arguments, f"the run on {name}")
    return compare_folders([output / name for name in backends], output)


def _keep_plan(path: Path, plan: Plan) -> None:
    """Write the plan of the runs; RunError when another one lies there."""
    if path.exists():
        if load_plan(path) != plan:
            raise RunError(f"{path}: holds another plan; name another folder")
        return
    write_file(path, plan_to_yaml(plan))


def compare_folders(
    runs: Sequence[Path], output: Path | None, model: Model | None = None, data: Data | None = None
) -> Comparison:
    """Compare complete runs with the first; replay the first on the others' backends where it has not been done.

    Args:
        runs: run folders, the reference first.
        output: gets comparison.json and report.html; None writes neither.
        model: a fresh model of the other run's framework, where the plan names none; the replay runs in this process.
        data: the runs' data, where the plan names none.

    Raises:
        RunError: a run is not complete, the plans differ, or a file cannot be written.
    """
    reference = RunFolder(runs[0])
    reference.require_complete()
    verdicts: list[Verdict] = []
    for path in runs[1:]:
        other = RunFolder(path)
        same_plan(reference, other)
        replayed, why_not = _replayed(reference, other, model, data)
        verdicts.extend(compare(reference, other, replayed, why_not))
    comparison = Comparison(runs=tuple(read_report(run / "report.json") for run in runs), verdicts=tuple(verdicts))
    if output is not None:
        make_folder(output)
        write_file(output / "comparison.json", comparison.model_dump_json(indent=1))
        write_html(output / "report.html", comparison)
    return comparison


def same_plan(first: RunFolder, second: RunFolder) -> None:
    """RunError, naming the keys, when two runs' plans differ in more than where they ran and what they started from."""
    plans = [
        folder.plan().model_dump(mode="json", exclude={"name", "backend", "device", "baseline"})
        for folder in (first, second)
    ]
    changed = [key for key in plans[0] if plans[0][key] != plans[1][key]]
    if changed:
        raise RunError(f"{first.path} and {second.path} cannot be compared: their plans differ in {', '.join(changed)}")


def _replayed(
    reference: RunFolder, other: RunFolder, model: Model | None, data: Data | None
) -> tuple[Path | None, str]:
    """Folder of the reference's replay on the other's backend, made now if need be; or None and why there is none."""
    plan = reference.plan()
    sides = [str(folder.facts()["backend"]) for folder in (reference, other)]
    if sides[0] == sides[1]:
        return None, f"both runs are on {sides[0]}: a framework compared with itself proves nothing"
    folder = other.path / f"replay-of-{sides[0]}"
    given = model is not None or data is not None
    if not given and (folder / "replay.json").exists() and read_replay(folder).reference_digest == reference.digest():
        return folder, ""
    if (plan.model is None and model is None) or (plan.data is None and data is None):
        return None, NOT_IN_PLAN
    if given:
        replay(reference.path, sides[1], folder, data, model)
    else:
        arguments = ["replay", str(reference.path), "--backend", sides[1], "--output", str(folder)]
        _process(arguments, "the replay")
    return folder, ""


def _process(arguments: Sequence[str], what: str) -> None:
    """Run slimbridge in a process of its own, its output to this one's terminal."""
    environment = {**os.environ, "SLIMBRIDGE_CHILD": "1"}
    code = subprocess.run([sys.executable, "-m", "slimbridge", *arguments], env=environment, check=False).returncode
    if code != 0:
        ended = f"was killed by signal {-code}" if code < 0 else "failed"
        raise RunError(f"{what} {ended}; what is complete is kept: mend the cause and run again with --resume")
