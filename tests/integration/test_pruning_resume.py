"""Runs that prune, killed at any place, end as unbroken ones: bit for bit, with the same decisions."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slimbridge as sb
from slimbridge import prune_stages
from slimbridge.decisions import load_decision
from slimbridge.parity import differing
from slimbridge.ports import Backend
from slimbridge.runfolder import RunFolder, stage_names
from slimbridge.train import Quiet
from tests.integration.small_nets import DATA, TRAIN, net, steady_latency

TWO = {**TRAIN, "epochs": 2}
GRADUAL = {"train": TWO, "frequency": 2}


def prepared(method: str, **more: Any) -> dict[str, Any]:
    """A prune stage with a training before and one after the removal."""
    preparation = {"method": method, "strength": 0.05, "train": TWO}
    return {"kind": "prune", "pruning_ratio": 0.5, "preparation": preparation, "finetune": TWO, **more}


def sparsify(**more: Any) -> dict[str, Any]:
    return {"kind": "sparsify", "sparsity": 0.5, "finetune": TWO, **more}


PLANS: dict[str, list[dict[str, Any]]] = {
    "soft": [prepared("soft")],
    "growing": [prepared("growing")],
    "group lasso": [prepared("group_lasso")],
    "scales": [prepared("bn_slimming", importance="bn_scale")],
    "gradual": [sparsify(gmp=GRADUAL), {"kind": "prune", "pruning_ratio": 0.5, "finetune": TWO}],
    "masks": [sparsify(importance="snip", steps=2), sparsify(sparsity=0.8), {"kind": "quantize"}],
    "rounds": [prepared("growing", steps=2, importance="taylor")],
    "target in rounds": [
        {"kind": "prune", "target": {"of": "macs", "remove": 0.6}, "steps": 2, "finetune": TWO, "importance": "fisher"}
    ],
    "initial": [
        {"kind": "prune", "pruning_ratio": 0.3, "finetune": TWO},
        {"kind": "prune", "pruning_ratio": 0.6, "finetune": TWO, "relative_to": "initial"},
    ],
}


TRAININGS = {
    **dict.fromkeys(("soft", "growing", "group lasso", "scales", "target in rounds", "initial"), 3),
    **dict.fromkeys(("gradual", "masks", "rounds"), 4),
}
"""The baseline's and those of the stages."""


class Killing(Quiet):
    """Stops a run at a step of a piece of work, as a signal would; lists the pieces it was told of."""

    def __init__(self, at: tuple[str, int] = ("", 0)) -> None:
        self.at, self.work, self.steps = at, list[str](), 0

    def start(self, text: str, total: int) -> None:
        self.work.append(text)
        self.steps = 0
        self.step()

    def step(self, note: str = "") -> None:
        if (self.work[-1], self.steps) == self.at:
            raise KeyboardInterrupt
        self.steps += 1

    def say(self, text: str) -> None:
        self.start(text.split(":")[0], 1)


def compress(backend: Backend, stages: list[dict[str, Any]], path: Path, killing: Killing | None = None) -> sb.Result:
    plan = {"baseline": {"train": TWO}, "stages": stages}
    return sb.compress(net(backend), plan, data=DATA, run_dir=path, resume=True, progress=killing or Quiet())


def assert_same(whole: RunFolder, broken: RunFolder) -> None:
    for name in stage_names(whole.plan()):
        first, second = whole.record(name), broken.record(name)
        assert differing(whole.weights(name), broken.weights(name)) == 0, name
        assert first.decision_digest == second.decision_digest, name
        assert (first.metric, first.metric_before_training) == (second.metric, second.metric_before_training)
        assert [epoch.terms for epoch in first.epochs] == [epoch.terms for epoch in second.epochs]
        assert (first.notes, first.zeros) == (second.notes, second.zeros)
    assert not [file for file in broken.path.iterdir() if file.name.startswith(("checkpoint", "under-way", "start"))]


@pytest.mark.parametrize("name", PLANS)
def test_killed_again_and_again(backend: Backend, name: str, tmp_path: Path) -> None:
    """One run, killed in each epoch of every training, before each decision and after each stage."""
    told = Killing()
    compress(backend, PLANS[name], tmp_path / "whole", told)
    places = [(work, step) for work in dict.fromkeys(told.work) for step in ((1, 5) if "training" in work else (0,))]
    assert len([work for work, step in places if step == 5]) == TRAININGS[name]
    for place in places:
        killing = Killing(place)
        with pytest.raises(KeyboardInterrupt):
            compress(backend, PLANS[name], tmp_path / "run", killing)
    compress(backend, PLANS[name], tmp_path / "run")
    assert_same(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run"))


KILLED_IN_THE_MIDDLE = """
import os, signal, sys
from pathlib import Path
from slimbridge.discovery import get_backend
from tests.integration.test_pruning_resume import PLANS, Killing, compress

class Ends(Killing):
    def step(self, note=""):
        try:
            super().step(note)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGKILL)

compress(get_backend(sys.argv[1]), PLANS[sys.argv[2]], Path(sys.argv[3]), Ends((sys.argv[4], 5)))
"""


@pytest.mark.parametrize(
    ("name", "training"),
    [("soft", "01-prune-preparation: training"), ("gradual", "01-sparsify-gmp: training")],
)
def test_killed_by_a_signal(backend: Backend, name: str, training: str, tmp_path: Path) -> None:
    """A process that ends with nothing tidied up, in the second epoch of the training inside a stage."""
    arguments = [sys.executable, "-c", KILLED_IN_THE_MIDDLE, backend.name, name, str(tmp_path / "run"), training]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / f"run/checkpoint-{training.removesuffix(': training')}.safetensors").exists()
    compress(backend, PLANS[name], tmp_path / "run")
    compress(backend, PLANS[name], tmp_path / "whole")
    assert_same(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run"))


def test_a_choice_by_measured_times_is_kept(backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are other ones when the run is resumed; what they chose is not."""
    stage = {"kind": "prune", "target": {"of": "latency", "remove": 0.5}, "finetune": TWO}
    monkeypatch.setattr(prune_stages, "measure_latency", steady_latency)

    with pytest.raises(KeyboardInterrupt):
        compress(backend, [stage], tmp_path / "run", Killing(("01-prune: training", 1)))
    pending = load_decision(tmp_path / "run/under-way/pending-01-prune.json")

    def slower(side: Backend, model: Any, *more: Any) -> Any:
        record = steady_latency(side, model, *more)
        return record.model_copy(update={"median_ms": record.median_ms + 100})

    monkeypatch.setattr(prune_stages, "measure_latency", slower)
    record = compress(backend, [stage], tmp_path / "run").report.stages[1]
    assert RunFolder(tmp_path / "run").decision("01-prune") == pending
    (note,) = [note for note in record.notes if note.startswith("target:")]
    assert "measured again" in note
    monkeypatch.setattr(prune_stages, "measure_latency", steady_latency)
    whole = compress(backend, [stage], tmp_path / "whole").report.stages[1]
    assert whole.weights_digest == record.weights_digest
