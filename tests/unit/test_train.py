"""Training: learning rates, what one step sees, resuming, what is refused, the metric."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimbridge.distill import hard_labels
from slimbridge.errors import ModelError, RunError, SlimbridgeError
from slimbridge.parity import differing, relative, tolerance
from slimbridge.plan import TrainSection
from slimbridge.ports import Array, Backend, Loss, Model
from slimbridge.tasks import Split
from slimbridge.train import Training, derived_seed, evaluate, optimizer_settings, outputs_of, train
from slimbridge.train.checkpoint import load_checkpoint
from slimbridge.train.schedules import learning_rate

RNG = np.random.default_rng(4)
DATA = Split(RNG.standard_normal((22, 3, 4, 4)).astype(np.float32), RNG.integers(0, 4, 22))


# Learning rates


def rates(steps_per_epoch: int = 10, **settings: Any) -> Array:
    made = TrainSection(**{"epochs": 5, "learning_rate": 0.1, "schedule": "constant", **settings})
    return np.array([learning_rate(made, step, steps_per_epoch) for step in range(made.epochs * steps_per_epoch)])


def test_schedules_by_formula() -> None:
    done = np.arange(50) / 50
    assert (rates() == 0.1).all()
    assert relative(rates(schedule="linear"), 0.1 * (1 - done)) <= tolerance("statistics_float64").value
    wanted = np.array([0.1 * (1 + cos(pi * share)) / 2 for share in done])
    assert relative(rates(schedule="cosine"), wanted) <= tolerance("statistics_float64").value


def test_the_sum_of_a_schedule_is_the_area_under_it() -> None:
    """Half of the peak times the steps, and half a first step more, for both that fall to 0."""
    for schedule in ("linear", "cosine"):
        expected = np.array(0.1 * 50 / 2 + 0.1 / 2)
        assert relative(rates(schedule=schedule).sum(), expected) <= tolerance("statistics_float64").value


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.5, 1.0, 2.0])
def test_a_warm_up_rises_in_a_line_and_then_the_schedule_begins(schedule: str, warmup: float) -> None:
    found = rates(schedule=schedule, warmup_epochs=warmup)
    first = int(warmup * 10)
    rise = np.diff(np.concatenate([[0.0], found[: first + 1]]))
    assert relative(rise, np.full(first + 1, 0.1 / (first + 1))) <= tolerance("statistics_float64").value
    assert found[first] == 0.1
    assert (np.diff(found[first:]) <= 0).all()
    assert (found > 0).all()


def test_a_warm_up_of_the_whole_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_epochs 5\.0 must be less than epochs 5"):
        rates(warmup_epochs=5.0)


def test_settings_reach_the_port() -> None:
    section = TrainSection.model_validate(
        {"epochs": 1, "optimizer": {"kind": "adamw", "weight_decay": 0.3, "betas": [0.5, 0.6]}}
    )
    found = optimizer_settings(section)
    assert (found.kind, found.weight_decay, found.betas) == ("adamw", 0.3, (0.5, 0.6))


def test_derived_seeds_differ_and_repeat() -> None:
    seeds = {derived_seed(0, "stage", epoch) for epoch in range(50)} | {derived_seed(1, "stage", 0)}
    assert len(seeds) == 51
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derived_seed(3, "a", 1) == derived_seed(3, "a", 1)


# The loop


def model_of(backend: Backend) -> Model:
    """With batch normalisation and dropout: all that a resumed training could get wrong."""
    nn = backend.nn
    body = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Dropout(0.3), nn.Linear(16, 4))
    model = nn.Sequential(*body)
    rng = np.random.default_rng(9)
    arrays = {name: rng.standard_normal(array.shape).astype(np.float32) for name, array in backend.read(model).items()}
    return backend.write(model, {name: np.abs(a) + 0.5 if "var" in name else a for name, a in arrays.items()})


def training_of(backend: Backend, model: Model, checkpoint: Path | None = None, **settings: Any) -> Training:
    def objective(inputs: tuple[Array, ...], targets: Array) -> Loss:
        native = backend.tensor(model, targets)
        return lambda result: {"loss": hard_labels(backend.ops, result.output, native)}

    chosen = {"epochs": 4, "batch_size": 8, "learning_rate": 0.05, "warmup_epochs": 0.5, **settings}
    return Training(TrainSection.model_validate(chosen), DATA, objective, 5, "01-test", checkpoint=checkpoint)


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


class Mortal:
    """A backend whose training ends after some steps."""

    def __init__(self, inner: Any, steps: int) -> None:
        self.inner, self.left = inner, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def train_step(self, *arguments: Any) -> Any:
        if self.left == 0:
            raise KilledError
        self.left -= 1
        return self.inner.train_step(*arguments)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("steps", [0, 3, 7, 11])
def test_a_killed_training_resumes_to_the_same_bits(backend: Backend, tmp_path: Path, kind: str, steps: int) -> None:
    settings = {"optimizer": {"kind": kind}, "learning_rate": 0.01}
    model = model_of(backend)
    unbroken, history = train(backend, model, training_of(backend, model, **settings))
    model, path = model_of(backend), tmp_path / "c.safetensors"
    with pytest.raises(KilledError):
        train(Mortal(backend, steps), model, training_of(backend, model, path, **settings))  # type: ignore[arg-type]
    assert path.exists() == (steps >= 3)
    model = model_of(backend)
    resumed, again = train(backend, model, training_of(backend, model, path, **settings))
    assert differing(backend.read(resumed), backend.read(unbroken)) == 0
    assert [replace_seconds(record) for record in again] == [replace_seconds(record) for record in history]
    assert len(history) == 4


def replace_seconds(record: Any) -> Any:
    return record.model_copy(update={"seconds": 0.0})


def test_a_training_that_is_done_changes_nothing(torch_backend: Backend, tmp_path: Path) -> None:
    model = model_of(torch_backend)
    trained, _ = train(torch_backend, model, training_of(torch_backend, model, tmp_path / "c"))
    fresh = model_of(torch_backend)
    again, history = train(torch_backend, fresh, training_of(torch_backend, fresh, tmp_path / "c"))
    assert differing(torch_backend.read(again), torch_backend.read(trained)) == 0
    assert len(history) == 4


def test_the_record_is_the_mean_over_samples(torch_backend: Backend) -> None:
    """One epoch at a learning rate of next to nothing: the loss of each sample counts once."""
    nn = torch_backend.nn
    model = nn.Sequential(nn.Flatten(1), nn.Linear(48, 4))
    settings = {"epochs": 1, "learning_rate": 1e-30, "warmup_epochs": 0.0, "schedule": "constant"}
    _, (record,) = train(torch_backend, model, training_of(torch_backend, model, **settings))
    logits = outputs_of(torch_backend, model, [DATA.inputs]).astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    expected = -log_p[np.arange(22), DATA.targets].mean()
    assert relative(np.array(record.terms["loss"]), expected) <= tolerance("operation").value
    assert record.epoch == 1
    assert record.learning_rate == 1e-30


class Counting:
    """A backend that notes the sizes of the batches."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.sizes = inner, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def train_step(self, model: Any, optimizer: Any, inputs: Any, *rest: Any) -> Any:
        self.sizes.append(len(inputs[0]))
        return self.inner.train_step(model, optimizer, inputs, *rest)


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 7, 7]), (7, [6, 6, 5, 5]), (22, [22]), (64, [22])])
def test_an_epoch_has_batches_of_nearly_equal_size(torch_backend: Backend, batch_size: int, sizes: list[int]) -> None:
    counting, model = Counting(torch_backend), model_of(torch_backend)
    train(counting, model, training_of(torch_backend, model, epochs=1, batch_size=batch_size))  # type: ignore[arg-type]
    assert counting.sizes == sizes


class Loader:
    """Batches of one's own, the last of a single sample."""

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        for rows in (slice(0, 7), slice(7, 14), slice(14, 21), slice(21, 22)):
            yield np.asarray(DATA.inputs[rows]), DATA.targets[rows]


def test_a_last_batch_of_one_sample_is_left_out(torch_backend: Backend) -> None:
    counting, model = Counting(torch_backend), model_of(torch_backend)
    training = replace(training_of(torch_backend, model, epochs=2), source=Loader())
    train(counting, model, training)  # type: ignore[arg-type]
    assert counting.sizes == [7, 7, 7] * 2
    counting = Counting(torch_backend)
    nn = torch_backend.nn
    plain = nn.Sequential(nn.Flatten(1), nn.Linear(48, 4))
    training = replace(training_of(torch_backend, plain, epochs=1, batch_size=1), source=Loader())
    train(counting, plain, training)  # type: ignore[arg-type]
    assert counting.sizes == [7, 7, 7, 1], "whoever asks for batches of one gets them"


def test_stages_and_epochs_draw_their_own_orders(torch_backend: Backend) -> None:
    seen: list[list[int]] = []

    def first_targets(stream: str) -> list[int]:
        model = model_of(torch_backend)
        training = replace(training_of(torch_backend, model, epochs=2, batch_size=22), stream=stream)
        orders: list[int] = []
        objective = training.objective

        def noted(inputs: tuple[Array, ...], targets: Array) -> Loss:
            orders.extend(int(value) for value in inputs[0][:, 0, 0, 0] * 1000)
            return objective(inputs, targets)

        train(torch_backend, model, replace(training, objective=noted))
        return orders

    for stream in ("01-a", "01-a", "02-b"):
        orders = first_targets(stream)
        seen += [orders[:22], orders[22:]]
    assert seen[:2] == seen[2:4]
    assert len({tuple(order) for order in seen}) == 4
    assert all(sorted(order) == sorted(seen[0]) for order in seen)


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(backend: Backend, tmp_path: Path) -> None:
    model, path = model_of(backend), tmp_path / "c"
    training = training_of(backend, model, path)
    steps = []

    def spoiled(inputs: tuple[Array, ...], targets: Array) -> Loss:
        steps.append(1)
        loss = training.objective(inputs, targets)
        if len(steps) < 5:
            return loss
        return lambda result: {name: term * float("nan") for name, term in loss(result).items()}

    with pytest.raises(ModelError, match=r"finite"):
        train(backend, model, replace(training, objective=spoiled))
    found = load_checkpoint(path)
    assert found is not None
    assert len(found.history) == 1
    assert all(np.isfinite(array).all() for array in found.weights.values())


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_damaged_checkpoint_is_named(torch_backend: Backend, tmp_path: Path, content: bytes | None) -> None:
    model, path = model_of(torch_backend), tmp_path / "c.safetensors"
    train(torch_backend, model, training_of(torch_backend, model, path, epochs=1))
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    with pytest.raises(RunError, match=r"c\.safetensors: not a"):
        train(torch_backend, model, training_of(torch_backend, model, path))


# The metric


def test_the_metric_is_over_all_samples_in_order(backend: Backend) -> None:
    seen = []

    def metric(outputs: Array, targets: Array) -> float:
        seen.append((outputs.shape, targets.tolist()))
        return float((outputs.argmax(1) == targets).mean())

    model = model_of(backend)
    found = evaluate(backend, model, DATA, metric)
    assert seen == [((22, 4), DATA.targets.tolist())]
    wanted = outputs_of(backend, model, [DATA.inputs]).argmax(1) == DATA.targets
    assert found == wanted.mean()


def test_a_metric_that_is_not_finite(torch_backend: Backend) -> None:
    with pytest.raises(SlimbridgeError, match=r"the metric is nan over 22 samples; it must be finite"):
        evaluate(torch_backend, model_of(torch_backend), DATA, lambda outputs, targets: float("nan"))
