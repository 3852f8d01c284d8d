"""One plan on both frameworks: what must be equal is, and a difference that is planted is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slimbridge import compare_runs, compress, zoo
from slimbridge.errors import RunError
from slimbridge.multirun import run_several
from slimbridge.parity import compare
from slimbridge.plan import load_plan
from slimbridge.report import Comparison, Verdict
from slimbridge.runfolder import RunFolder
from slimbridge.tasks import load_data
from tests.integration.tiny import PLAN


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_several(load_plan(PLAN), ["torch", "paddle"], folder, resume=True)


def of_class(verdicts: tuple[Verdict, ...], parity: str) -> list[Verdict]:
    return [verdict for verdict in verdicts if verdict.parity == parity]


def test_exact_claims_are_exact(runs: tuple[Path, Comparison]) -> None:
    exact = of_class(runs[1].verdicts, "exact")
    assert {verdict.figure for verdict in exact} == {0.0}
    claims = {verdict.claim for verdict in exact}
    assert {
        "channels removed, from equal weights",
        "int8 weights, from equal weights",
        "MACs of the reference's model, counted on both frameworks",
    } <= claims


def test_numeric_claims_are_within_and_not_trivial(runs: tuple[Path, Comparison]) -> None:
    """Two frameworks that never differ in the last digit would mean that one was compared with itself."""
    numeric = of_class(runs[1].verdicts, "numeric")
    assert all(verdict.passed for verdict in numeric)
    assert any(verdict.figure for verdict in numeric)


def test_both_start_from_the_same_weights(runs: tuple[Path, Comparison]) -> None:
    reference, other = (RunFolder(runs[0] / name) for name in ("torch", "paddle"))
    assert reference.record("01-prune").input_digest == other.record("01-prune").input_digest
    assert reference.record("02-distill").input_digest != other.record("02-distill").input_digest
    assert reference.decision("01-prune") == other.decision("01-prune")


def test_weights_on_disk_are_int8(runs: tuple[Path, Comparison]) -> None:
    for name in ("torch", "paddle"):
        stored = load_file(runs[0] / name / "03-quantize/weights.safetensors")
        kinds = {key: array.dtype for key, array in stored.items() if array.ndim in (2, 4) and ":" not in key}
        assert set(kinds.values()) == {np.dtype(np.int8)}


def test_the_report_is_written(runs: tuple[Path, Comparison]) -> None:
    saved = Comparison.model_validate(json.loads((runs[0] / "comparison.json").read_text()))
    assert saved == runs[1]
    assert "<html" in (runs[0] / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("stage", "file", "key", "claim"),
    [
        ("03-quantize", "weights.safetensors", "layer1.0.conv1.weight", "int8 weights, from equal weights"),
        ("00-baseline", "probe.safetensors", "output", "outputs of the reference's weights on both frameworks"),
    ],
)
def test_a_planted_difference_is_found(
    runs: tuple[Path, Comparison], tmp_path: Path, stage: str, file: str, key: str, claim: str
) -> None:
    """One entry is changed in the replay, as a framework with a fault would give it."""
    replay = tmp_path / "replay"
    shutil.copytree(runs[0] / "paddle/replay-of-torch", replay)
    name = "integers.safetensors" if file == "weights.safetensors" else file
    arrays = load_file(replay / stage / name)
    flat = arrays[key].reshape(-1)
    flat[0] += 1
    save_file(arrays, replay / stage / name)
    reference, other = (RunFolder(runs[0] / side) for side in ("torch", "paddle"))
    failed = {verdict.claim for verdict in compare(reference, other, replay) if verdict.passed is False}
    assert claim in failed


def test_a_damaged_run_is_not_compared(runs: tuple[Path, Comparison], tmp_path: Path) -> None:
    """Weights that are not those of the record cannot pass for a run that is equal."""
    shutil.copytree(runs[0] / "paddle", tmp_path / "paddle")
    path = tmp_path / "paddle/02-distill/weights.safetensors"
    arrays = load_file(path)
    save_file({name: array + 1 for name, array in arrays.items()}, path)
    with pytest.raises(RunError, match=r"damaged or changed"):
        compare_runs(runs[0] / "torch", tmp_path / "paddle")


def test_runs_of_different_plans_are_not_compared(runs: tuple[Path, Comparison], tmp_path: Path) -> None:
    shutil.copytree(runs[0] / "paddle", tmp_path / "paddle")
    plan = tmp_path / "paddle/plan.yaml"
    plan.write_text(plan.read_text().replace("l1_norm", "l2_norm"))
    with pytest.raises(RunError, match=r"their plans differ in stages"):
        compare_runs(runs[0] / "torch", tmp_path / "paddle")


def test_one_framework_is_not_compared_with_itself(runs: tuple[Path, Comparison]) -> None:
    verdicts = compare_runs(runs[0] / "torch", runs[0] / "torch").verdicts
    assert {verdict.passed for verdict in verdicts if verdict.parity == "numeric"} == {None}
    assert any("proves nothing" in verdict.reason for verdict in verdicts)


def test_a_model_of_ones_own_is_replayed(runs: tuple[Path, Comparison], tmp_path: Path) -> None:
    """A fresh model and the data are handed over in place of the plan's."""
    data = load_data("digits", channels=1, image_size=12)
    paths = []
    for name in ("torch", "paddle"):
        model = zoo.build("lenet", name, image_size=12)
        baseline = {"weights": str(paths[0] / "00-baseline/weights.safetensors")} if paths else {}
        plan = {"baseline": baseline, "stages": [{"kind": "prune", "pruning_ratio": 0.5}]}
        paths.append(compress(model, plan, data=data, run_dir=tmp_path / name).folder)
    fresh = zoo.build("lenet", "paddle", image_size=12, seed=9)
    verdicts = compare_runs(*paths, model=fresh, data=data).verdicts
    assert {verdict.passed for verdict in verdicts} == {True}
    without = compare_runs(tmp_path / "torch", tmp_path / "paddle")
    assert {verdict.passed for verdict in without.verdicts} == {True}, "the replay is kept"
