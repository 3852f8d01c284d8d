"""Weight files, run folders and the writing of files: all or nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from slimbridge.decisions import DistillDecision, GroupChoice, PruneDecision, load_decision
from slimbridge.errors import RunError
from slimbridge.files import locked, write_file
from slimbridge.plan import Plan, load_plan
from slimbridge.report.records import LatencyRecord, StageRecord
from slimbridge.runfolder import RunFolder, StageResult, stage_names
from slimbridge.weights import digest_of, load_stored, load_weights, save_weights

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, np.float32)}
FACTS = {
    "backend": "torch",
    "slimbridge": "0",
    "versions": {},
    "machine": "one",
    "model": {},
    "data": "digits",
    "loss": None,
    "metric": None,
}


# Files


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"
    write_file(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, ARRAYS)

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(RunError, match=r"w\.safetensors: cannot be written: No space left on device"):
            save_weights(path, {"a.weight": np.zeros(1000, np.float32)})
    assert digest_of(load_weights(path)) == digest_of(ARRAYS)
    assert list(tmp_path.iterdir()) == [path], "nothing temporary is left"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be written: No such file or directory"):
        write_file(tmp_path / "none" / "x", "")


def test_the_rights_of_a_file_are_the_ordinary_ones(tmp_path: Path) -> None:
    """A temporary file would be readable by its owner alone."""
    write_file(tmp_path / "x", "")
    (tmp_path / "y").write_text("")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


# Weights


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_weights_come_back(tmp_path: Path, dtype: Any) -> None:
    arrays = {"x": np.arange(24).reshape(2, 3, 4).astype(dtype).transpose(2, 0, 1), "scalar": np.array(3, dtype)}
    save_weights(tmp_path / "w", arrays)
    found = load_weights(tmp_path / "w")
    assert digest_of(found) == digest_of(arrays)
    assert found["x"].dtype == dtype
    assert found["scalar"].shape == ()


@pytest.mark.parametrize("length", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, ARRAYS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RunError, match=r"w\.safetensors: not a weight file \(safetensors\)") as caught:
        load_weights(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(RunError, match=r"cannot be read"):
            load_weights(path)


def test_a_step_without_its_weight(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"a.weight:step": np.ones(2, np.float32)})
    with pytest.raises(RunError, match=r"'a\.weight:step' belongs to no weight"):
        load_weights(tmp_path / "w")


NAMED = st.dictionaries(
    st.text("abc.", min_size=1, max_size=3),
    hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=3), elements=st.floats(-9, 9, width=32)),
    min_size=1,
    max_size=3,
)


@given(NAMED, st.data())
def test_a_digest_changes_with_anything_and_with_nothing_else(arrays: dict[str, Any], data: Any) -> None:
    digest = digest_of(arrays)
    assert len(digest) == 64
    assert digest == digest_of(dict(reversed([(name, array.copy()) for name, array in arrays.items()])))
    assert digest == digest_of({name: np.asfortranarray(array) for name, array in arrays.items()})
    name = data.draw(st.sampled_from(sorted(arrays)))
    bits = arrays[name].copy().view(np.uint32)
    bits.flat[data.draw(st.integers(0, bits.size - 1))] ^= 1
    assert digest != digest_of({**arrays, name: bits.view(np.float32)})
    assert digest != digest_of({**arrays, name: arrays[name][None]})
    assert digest != digest_of({**arrays, name: arrays[name].astype(np.float64)})
    renamed = {**{key: array for key, array in arrays.items() if key != name}, name + "x": arrays[name]}
    assert digest != digest_of(renamed)


def test_an_array_cannot_pose_as_two() -> None:
    """Where one array ends and the next begins is part of the digest."""
    one = {"a": np.array([1.0, 2.0]), "b": np.array([3.0])}
    other = {"a": np.array([1.0]), "b": np.array([2.0, 3.0])}
    assert digest_of(one) != digest_of(other)


# Decisions


def decision(removed: tuple[int, ...] = (1,)) -> PruneDecision:
    return PruneDecision(
        importance="l1_norm",
        pruning_ratio=0.5,
        groups=(GroupChoice(layers=("a",), channels=2, removed=removed),),
        kept={"a.weight": {0: (0,)}},
        sizes={"a.weight": (2, 3)},
    )


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "prun"}', '{"kind": "prune"}', "\x00"])
def test_what_is_no_decision_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "decision.json").write_text(text)
    with pytest.raises(RunError, match=r"decision\.json: not a decision file") as caught:
        load_decision(tmp_path / "decision.json")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(RunError, match=r"cannot be read"):
        load_decision(tmp_path / "none.json")


# Run folders


def plan_of(**rest: Any) -> Plan:
    stages = [{"kind": "prune", "pruning_ratio": 0.5}, {"kind": "quantize"}]
    return load_plan({"stages": stages, **rest})


def result(chosen: Any = None) -> StageResult:
    latency = LatencyRecord(median_ms=1.0, spread_ms=0.1, runs=3, batch=1, threads=1, how="test")
    record = StageRecord(
        index=1,
        kind="prune",
        name="01-prune",
        metric=0.5,
        metric_before_training=None,
        parameters=8,
        macs=9,
        size_bytes=0,
        latency=latency,
        seconds=0.1,
        input_digest="abc",
        decision_digest=(chosen or decision()).digest(),
        epochs=(),
        notes=(),
    )
    return StageResult(record, ARRAYS, chosen or decision(), np.zeros((2, 2), np.float32))


def test_a_stage_is_there_at_once_and_whole(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", plan_of(), FACTS, ARRAYS)
    assert stage_names(plan_of()) == ("00-baseline", "01-prune", "02-quantize")
    folder.checkpoint("01-prune").write_bytes(b"")
    assert not folder.done("01-prune")
    folder.commit("01-prune", result())
    assert folder.done("01-prune")
    assert not folder.checkpoint("01-prune").exists()
    assert digest_of(folder.weights("01-prune")) == digest_of(ARRAYS)
    assert folder.decision("01-prune") == decision()
    assert folder.changes("01-prune") == [decision()]
    size = (tmp_path / "run" / "01-prune" / "weights.safetensors").stat().st_size
    assert folder.record("01-prune").size_bytes == size
    assert folder.plan() == plan_of()
    assert folder.facts() == FACTS


def test_a_stage_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run", plan_of(), FACTS, ARRAYS)
    folder.checkpoint("01-prune").write_bytes(b"kept")
    before = sorted(path.name for path in folder.path.iterdir())

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"No space left on device"):
            folder.commit("01-prune", result())
    assert not folder.done("01-prune")
    assert sorted(path.name for path in folder.path.iterdir()) == before
    folder.commit("01-prune", result())
    assert folder.done("01-prune")


def test_what_a_killed_commit_left_does_not_count(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", plan_of(), FACTS, ARRAYS)
    (folder.path / ".01-prune.part").mkdir()
    (folder.path / ".01-prune.part" / "weights.safetensors").write_bytes(b"half")
    assert not folder.done("01-prune")
    folder.commit("01-prune", result())
    assert digest_of(folder.weights("01-prune")) == digest_of(ARRAYS)


def test_a_distillation_does_not_change_the_form(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", plan_of(), FACTS, ARRAYS)
    folder.commit("01-prune", result(DistillDecision(teacher="baseline", teacher_digest="", terms=())))
    assert folder.changes("01-prune") == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunError, match=r"exists and is not empty; resume it, or name another folder"):
        RunFolder.create(tmp_path, plan_of(), FACTS, ARRAYS)
    with pytest.raises(RunError, match=r"exists and is not empty|cannot be made"):
        RunFolder.create(tmp_path / "note.txt", plan_of(), FACTS, ARRAYS)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_another_plan_or_start_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunFolder.create(path, plan_of(), FACTS, ARRAYS)
    assert RunFolder.resume(path, plan_of(), FACTS).plan() == plan_of()
    with pytest.raises(RunError, match=r"its plan differs in seed"):
        RunFolder.resume(path, plan_of(seed=1), FACTS)
    with pytest.raises(RunError, match=r"cannot be resumed on other: it was begun on torch"):
        RunFolder.resume(path, plan_of(), {**FACTS, "backend": "other"})
    for key in ("model", "data", "loss", "metric"):
        with pytest.raises(RunError, match=rf"cannot be resumed: the {key} is not the one that it began with"):
            RunFolder.resume(path, plan_of(), {**FACTS, key: "other"})


def test_what_a_run_killed_in_its_first_moments_left_is_begun_again(tmp_path: Path) -> None:
    whole = RunFolder.create(tmp_path / "run", plan_of(), FACTS, ARRAYS)
    (whole.path / "run.json").unlink()
    (whole.path / ".plan.yaml.abc").write_text("half")
    assert RunFolder.create(whole.path, plan_of(), FACTS, ARRAYS).facts() == FACTS


def test_damage_is_found(tmp_path: Path) -> None:
    """Other weights or another decision than the stage ended with, or a stage that is gone."""
    folder = RunFolder.create(tmp_path / "run", plan_of(), FACTS, ARRAYS)
    folder.commit("01-prune", result())
    with pytest.raises(RunError, match=r"stage 00-baseline is gone though 01-prune is there"):
        folder.complete_stages()
    place = folder.path / "01-prune"
    save_weights(place / "weights.safetensors", {name: array + 1 for name, array in ARRAYS.items()})
    with pytest.raises(RunError, match=r"damaged or changed"):
        folder.weights("01-prune")
    (place / "decision.json").unlink()
    with pytest.raises(RunError, match=r"decision\.json: cannot be read"):
        folder.decision("01-prune")


def test_what_is_no_run_folder_is_named(tmp_path: Path) -> None:
    for ask in (lambda: RunFolder(tmp_path).plan(), lambda: RunFolder(tmp_path).facts()):
        with pytest.raises(RunError, match=r"not a run folder \(it has no plan\.yaml and run\.json\)"):
            ask()
    folder = RunFolder.create(tmp_path / "run", plan_of(), FACTS, ARRAYS)
    (folder.path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: cannot be read"):
        folder.facts()
    with pytest.raises(RunError, match=r"record\.json: cannot be read"):
        folder.record("01-prune")


def test_stored_arrays_keep_their_types(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", {"x": np.array([1, -128], np.int8), "y": np.array([0.5])})
    found = load_stored(tmp_path / "w")
    assert found["x"].dtype == np.int8
    assert found["y"].dtype == np.float64


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = "import sys, pathlib, slimbridge.files as f\nwith f.locked(pathlib.Path(sys.argv[1])): pass"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with locked(tmp_path / ".lock"):
        held = subprocess.run(command, check=False, capture_output=True, text=True)
    free = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "another process is working in it" in held.stderr
    assert (held.returncode, free.returncode) == (1, 0)


def test_a_run_that_fits_keeps_its_start_and_an_untrained_one_that_does_not_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunFolder.create(path, plan_of(), FACTS, ARRAYS)
    fits = RunFolder.reopen(path, plan_of(), FACTS)
    assert fits is not None
    assert (path / "start.safetensors").exists()
    with locked(path / ".lock"), pytest.raises(RunError, match=r"another process is working in it"):
        RunFolder.reopen(path, plan_of(), {**FACTS, "loss": "mended"})
    assert fits.facts() == FACTS
    assert RunFolder.reopen(path, plan_of(), {**FACTS, "loss": "mended"}) is None
    again = RunFolder.create(path, plan_of(), FACTS, ARRAYS)
    again.checkpoint("00-baseline").write_bytes(b"trained")
    with pytest.raises(RunError, match=r"the loss is not the one that it began with"):
        RunFolder.reopen(path, plan_of(), {**FACTS, "loss": "mended"})
