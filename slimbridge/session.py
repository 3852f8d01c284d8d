"""One plan on several backends, each in a process of its own, and the comparison of what they gave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from slimbridge.errors import RunError
from slimbridge.files import write_file
from slimbridge.parity import compare
from slimbridge.parity.replay_records import read_replay
from slimbridge.plan import Plan, plan_to_yaml
from slimbridge.report.html import write_html
from slimbridge.report.records import Comparison, Verdict, read_report
from slimbridge.runfolder import RunFolder, stage_names
from slimbridge.weights import digest_of

NOT_IN_ZOO = "the plan names no zoo model, so the run cannot be replayed on the other framework"


def run_session(plan: Plan, backends: Sequence[str], output: Path, resume: bool) -> Comparison:
    """Run a plan on each backend; the first one's baseline weights start the others.

    Args:
        plan: it must name model and data.
        backends: names, the reference first.
        output: folder that gets one run folder for each backend, comparison.json and report.html.
        resume: go on with what is there.

    Raises:
        RunError: a run failed; its message has been printed by its own process.
    """
    if output.exists() and not resume and any(output.iterdir()):
        raise RunError(f"{output}: exists and is not empty; resume it, or name another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{output}: cannot be made: {error.strerror or error}") from error
    write_file(output / "plan.yaml", plan_to_yaml(plan))
    reference = output / backends[0]
    for name in backends:
        arguments = ["run", str(output / "plan.yaml"), "--backend", name, "--output", str(output / name), "--resume"]
        if name != backends[0]:
            arguments += ["--baseline", str(reference / stage_names(plan)[0] / "weights.safetensors")]
        _process(arguments, f"the run on {name}")
    return compare_folders([output / name for name in backends], output)


def compare_folders(runs: Sequence[Path], output: Path | None) -> Comparison:
    """Compare complete runs with the first; replay the first on the others' backends where it has not been done.

    Args:
        runs: run folders, the reference first.
        output: gets comparison.json and report.html; None writes neither.
    """
    reference = RunFolder(runs[0])
    verdicts: list[Verdict] = []
    for path in runs[1:]:
        other = RunFolder(path)
        replayed = _replayed(reference, other)
        verdicts.extend(compare(reference, other, replayed, "" if replayed else NOT_IN_ZOO))
    comparison = Comparison(runs=tuple(read_report(run / "report.json") for run in runs), verdicts=tuple(verdicts))
    if output is not None:
        write_file(output / "comparison.json", comparison.model_dump_json(indent=1))
        write_html(output / "report.html", comparison)
    return comparison


def _replayed(reference: RunFolder, other: RunFolder) -> Path | None:
    """Folder of the reference's replay on the other's backend, made now if need be; None for a model of one's own."""
    plan = reference.plan()
    if plan.model is None or plan.data is None:
        return None
    folder = other.path / f"replay-of-{reference.facts()['backend']}"
    names = stage_names(plan)
    if (folder / "replay.json").exists() and reference.done(names[-1]):
        digest = digest_of(reference.weights(names[-1]))
        if read_replay(folder).reference_digest == digest:
            return folder
    arguments = ["replay", str(reference.path), "--backend", other.facts()["backend"], "--output", str(folder)]
    _process(arguments, "the replay")
    return folder


def _process(arguments: Sequence[str], what: str) -> None:
    """Run slimbridge in a process of its own, its output to this one's terminal."""
    environment = {**os.environ, "SLIMBRIDGE_CHILD": "1"}
    code = subprocess.run([sys.executable, "-m", "slimbridge", *arguments], env=environment, check=False).returncode
    if code != 0:
        ended = f"was killed by signal {-code}" if code < 0 else "failed"
        raise RunError(f"{what} {ended}; what is complete is kept: mend the cause and run again with --resume")
