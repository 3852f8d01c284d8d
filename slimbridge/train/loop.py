"""The training loop, the same for every framework: data order and learning rates come from here."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge.plan.schema import TrainSection
from slimbridge.ports import Array, Backend, Loss, Model, Optimizer, OptimizerSettings
from slimbridge.report.records import EpochRecord
from slimbridge.tasks import Split, batches, epoch_order
from slimbridge.tasks.data import Batch
from slimbridge.tasks.order import generator
from slimbridge.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from slimbridge.train.progress import Progress, Quiet
from slimbridge.train.schedules import learning_rate

Objective = Callable[[tuple[Array, ...], Array], Loss]
"""From a batch (inputs, targets) to the loss of the model's pass on it."""
BeforeStep = Callable[[Model, Optimizer, int, int], None]
"""Called with the model, its optimizer, the step's number from 0 over the whole training, and steps per epoch."""


@dataclass(frozen=True)
class Training:
    """One training: what to learn from, how, and where to keep its checkpoint.

    Attributes:
        settings: how to train.
        source: the training data.
        objective: the loss of a batch.
        seed: of data order and of the framework's generators.
        stream: name of the stage, so that stages draw different orders.
        capture: layer paths whose features the loss looks at.
        checkpoint: file to resume from and to write after each epoch; None keeps none.
        progress: who is told.
        before_step: called before each step; a resumed training calls it with the numbers that an unbroken one would.
        masks: parameter -> True = trained; the other entries are held at zero, see `Optimizer.hold_zeros`.
    """

    settings: TrainSection
    source: Split | Iterable[Any]
    objective: Objective
    seed: int
    stream: str
    capture: tuple[str, ...] = ()
    checkpoint: Path | None = None
    progress: Progress = field(default_factory=Quiet)
    before_step: BeforeStep | None = None
    masks: Mapping[str, Array] = field(default_factory=dict)


def train(backend: Backend, model: Model, training: Training) -> tuple[Model, tuple[EpochRecord, ...]]:
    """Train a model in place.

    Every epoch seeds the framework anew, so that a resumed training goes on exactly like an unbroken one.

    Args:
        backend: the model's backend.
        model: trained in place.
        training: see `Training`.

    Returns:
        the model, and a record of each epoch.

    Raises:
        ModelError: the loss is not finite.
        RunError: the checkpoint cannot be written or read.
    """
    optimizer = backend.make_optimizer(model, optimizer_settings(training.settings))
    history: tuple[EpochRecord, ...] = ()
    found = load_checkpoint(training.checkpoint) if training.checkpoint else None
    if found is not None:
        model = backend.write(model, found.weights)
        optimizer.load_state(found.optimizer)
        history = found.history
    if training.masks:
        optimizer.hold_zeros(training.masks)
    settings = training.settings
    steps = sum(1 for _ in _epoch(training, 0)) if len(history) < settings.epochs else 1
    training.progress.start(f"{training.stream}: training", settings.epochs * steps)
    for _ in range(len(history) * steps):
        training.progress.step()
    for epoch in range(len(history), settings.epochs):
        history = (*history, _one_epoch(backend, model, optimizer, training, epoch, steps))
        if training.checkpoint is not None:
            save_checkpoint(training.checkpoint, Checkpoint(backend.read(model), optimizer.state(), history))
    return model, history


def _one_epoch(
    backend: Backend, model: Model, optimizer: Optimizer, training: Training, epoch: int, steps: int
) -> EpochRecord:
    started = time.perf_counter()
    seed_all(backend, derived_seed(training.seed, training.stream, epoch))
    mean = _Mean()
    rate = 0.0
    for number, (inputs, targets) in enumerate(_epoch(training, epoch), epoch * steps):
        rate = learning_rate(training.settings, number, steps)
        optimizer.set_lr(rate)
        if training.before_step is not None:
            training.before_step(model, optimizer, number, steps)
        loss = training.objective(inputs, targets)
        mean.add(backend.train_step(model, optimizer, inputs, loss, training.capture), len(targets))
        training.progress.step(f"epoch {epoch + 1}/{training.settings.epochs}, loss {mean.total():.4f}")
    seconds = time.perf_counter() - started
    return EpochRecord(epoch=epoch + 1, terms=mean.terms(), learning_rate=rate, seconds=round(seconds, 3))


def optimizer_settings(settings: TrainSection) -> OptimizerSettings:
    """The plan's optimizer as the port takes it."""
    return OptimizerSettings(**settings.optimizer.model_dump())


def seed_all(backend: Backend, seed: int) -> None:
    """Seed the framework, NumPy's and Python's global generators, from which loaders and augmentations draw."""
    backend.seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def derived_seed(seed: int, *stream: int | str) -> int:
    """A seed 0..2**31-1 that depends on the arguments only."""
    return int(generator(seed, *stream).bit_generator.random_raw()) & 0x7FFFFFFF


def _epoch(training: Training, epoch: int) -> Iterator[Batch]:
    """The batches of one epoch; a last batch of a single sample is left out, BatchNorm cannot use it."""
    order = None
    last: Batch | None = None
    if isinstance(training.source, Split):
        order = epoch_order(len(training.source), training.seed, training.stream, epoch)
    before: Batch | None = None
    for batch in batches(training.source, training.settings.batch_size, order):
        if before is not None:
            yield before
        last, before = before, batch
    lone = before is not None and len(before[1]) == 1 and last is not None and len(last[1]) > 1
    if before is not None and not (lone and training.settings.batch_size > 1):
        yield before


class _Mean:
    """Mean of each loss term, weighted by the batches' sizes."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, terms: dict[str, float], size: int) -> None:
        self._count += size
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * size

    def terms(self) -> dict[str, float]:
        return {name: value / max(self._count, 1) for name, value in self._sums.items()}

    def total(self) -> float:
        return float(np.sum(list(self.terms().values())))
