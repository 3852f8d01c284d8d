"""A run killed with SIGKILL at any stage resumes and ends as an unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from slimbridge.parity import differing
from slimbridge.plan import load_plan
from slimbridge.report import read_report
from slimbridge.runfolder import RunFolder, stage_names
from tests.integration.tiny import PLAN

# What must exist when the process is killed: in the first training, in a later one, and between two stages.
KILL_AT = ("checkpoint-00-baseline.safetensors", "checkpoint-01-prune.safetensors", "01-prune", "02-distill")


def command(plan: Path, backend: str, folder: Path) -> list[str]:
    arguments = ["run", str(plan), "--backend", backend, "--output", str(folder), "--resume", "--json"]
    return [sys.executable, "-m", "slimbridge", *arguments]


def run_to_end(plan: Path, backend: str, folder: Path) -> None:
    subprocess.run(command(plan, backend, folder), check=True, capture_output=True, timeout=300)


def kill_when(plan: Path, backend: str, folder: Path, file: str) -> bool:
    """Start a run and kill it as soon as the file is there; was it killed before its end?"""
    process = subprocess.Popen(command(plan, backend, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline and not (folder / file).exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module", params=["torch", "paddle"])
def unbroken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    base = tmp_path_factory.mktemp(request.param)
    plan = base / "plan.yaml"
    plan.write_text(yaml.safe_dump(PLAN))
    run_to_end(plan, request.param, base / "run")
    return request.param, plan, base / "run"


def test_killed_at_every_kind_of_place(unbroken: tuple[str, Path, Path], tmp_path: Path) -> None:
    """One run, killed four times on its way."""
    backend, plan, reference = unbroken
    killed = [kill_when(plan, backend, tmp_path / "run", file) for file in KILL_AT]
    assert any(killed[:2]), "the run was too fast to be killed under training"
    run_to_end(plan, backend, tmp_path / "run")
    whole, broken = RunFolder(reference), RunFolder(tmp_path / "run")
    for name in stage_names(load_plan(plan)):
        assert differing(whole.weights(name), broken.weights(name)) == 0, name
        assert np.array_equal(whole.probe(name)[0], broken.probe(name)[0])
        first, second = whole.record(name), broken.record(name)
        assert first.decision_digest == second.decision_digest
        assert first.metric == second.metric
        assert [epoch.terms for epoch in first.epochs] == [epoch.terms for epoch in second.epochs]
    assert not list((tmp_path / "run").glob("checkpoint*"))
    left = {entry for entry in os.listdir(tmp_path / "run") if entry.startswith(".")} - {".lock"}
    assert not left, f"leftovers: {left}"


def test_the_report_is_the_same(unbroken: tuple[str, Path, Path]) -> None:
    """A finished run that is resumed changes nothing."""
    backend, plan, reference = unbroken
    before = read_report(reference / "report.json")
    run_to_end(plan, backend, reference)
    assert read_report(reference / "report.json") == before


def test_another_plan_is_refused(unbroken: tuple[str, Path, Path], tmp_path: Path) -> None:
    backend, _, reference = unbroken
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**PLAN, "seed": 5}))
    done = subprocess.run(command(other, backend, reference), check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "plan differs in seed" in done.stderr
    assert "Traceback" not in done.stderr
