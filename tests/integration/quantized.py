"""A residual net and an attention net that have learned, and one run that quantizes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import slimbridge as sb
from slimbridge.decisions import QuantizeDecision
from slimbridge.discovery import get_backend
from slimbridge.runfolder import RunFolder
from tests.integration.small_nets import DATA, TRAIN, Attention, Part, net

SIDES = ("torch", "paddle")
LITTLE = {"calibration_batches": 2, "calibration_batch_size": 16}


class Residual(Part):
    """A stem, a block with one ReLU that is called twice, an average pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        nn = self.nn
        self.stem, self.n0 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.pool, self.last = nn.ReLU(), nn.AvgPool2d(4, 4), nn.Linear(32, 2)

    def forward(self, x: Any) -> Any:
        x = self.act(self.n0(self.stem(x)))
        x = self.act(self.n2(self.b(self.act(self.n1(self.a(x))))) + x)
        return self.last(self.nn.flatten(self.pool(x), 1))


PARTS: dict[str, type[Part]] = {"residual": Residual, "attention": Attention}


def learned(part: str, path: Path) -> Path:
    """The file of a net's weights after a training in a folder."""
    plan = {"stages": [{"kind": "finetune", "train": {**TRAIN, "epochs": 6}}]}
    done = sb.compress(net(get_backend("torch"), PARTS[part]), plan, data=DATA, run_dir=path)
    assert done.report.stages[1].metric == 1
    return path / "01-finetune/weights.safetensors"


def plan_of(baseline: Path, **stage: Any) -> dict[str, Any]:
    """A plan that starts from these weights and quantizes."""
    little = LITTLE if stage.get("mode", "static") == "static" else {}
    return {"baseline": {"weights": str(baseline)}, "stages": [{"kind": "quantize", **little, **stage}]}


def quantized(side: str, part: str, plan: dict[str, Any], path: Path) -> tuple[RunFolder, QuantizeDecision, Any]:
    """One run, the run's folder, its decision and result."""
    result = sb.compress(net(get_backend(side), PARTS[part]), plan, data=DATA, run_dir=path)
    folder = RunFolder(path)
    decision = folder.decision("01-quantize")
    assert isinstance(decision, QuantizeDecision)
    return folder, decision, result
