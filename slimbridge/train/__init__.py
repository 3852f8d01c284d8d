"""Training: the loop, schedules, checkpoints, progress, evaluation."""

from slimbridge.train.evaluate import evaluate, outputs_of
from slimbridge.train.loop import Training, derived_seed, optimizer_settings, seed_all, train
from slimbridge.train.progress import Progress, Quiet

__all__ = [
    "Progress",
    "Quiet",
    "Training",
    "derived_seed",
    "evaluate",
    "optimizer_settings",
    "outputs_of",
    "seed_all",
    "train",
]
