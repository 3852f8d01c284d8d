"""Learning rates: from the share of training done to a factor of the learning rate."""

from __future__ import annotations

from math import cos, pi

from slimbridge.plan.registries import SCHEDULES, Schedule
from slimbridge.plan.schema import TrainSection


@SCHEDULES.register("constant")
def constant() -> Schedule:
    """Always 1."""
    return lambda done: 1.0


@SCHEDULES.register("linear")
def linear() -> Schedule:
    """From 1 down to 0 in a straight line."""
    return lambda done: 1.0 - done


@SCHEDULES.register("cosine")
def cosine() -> Schedule:
    """Half a cosine from 1 to 0: (1 + cos(pi * done)) / 2.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5 without restarts.
    """
    return lambda done: (1.0 + cos(pi * done)) / 2.0


def learning_rate(settings: TrainSection, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step: a linear rise over the warm-up, then the schedule over what is left.

    Args:
        settings: how to train.
        step: counted from 0 over the whole training.
        steps_per_epoch: at least 1.
    """
    warmup = settings.warmup_epochs * steps_per_epoch
    if step < warmup:
        return settings.learning_rate * (step + 1) / (warmup + 1)
    total = max(settings.epochs * steps_per_epoch - warmup, 1)
    return settings.learning_rate * SCHEDULES.get(settings.schedule)()((step - warmup) / total)
