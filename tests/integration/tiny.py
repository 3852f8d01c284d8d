"""A plan that runs in seconds and has a stage of each kind."""

from __future__ import annotations

from typing import Any

TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 128, "learning_rate": 0.05}
PLAN: dict[str, Any] = {
    "name": "tiny",
    "model": {"name": "resnet18_small", "options": {"width": 8}},
    "data": {"name": "digits"},
    "baseline": {"train": TRAIN},
    "stages": [
        {"kind": "prune", "pruning_ratio": 0.5, "finetune": TRAIN},
        {"kind": "distill", "losses": [{"loss": "soft_labels"}, {"loss": "hard_labels"}], "train": TRAIN},
        {"kind": "quantize"},
    ],
}
