"""Cases on gradients, optimizers and training steps, against formulas in NumPy float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from slimbridge.conformance.models import image, random, topology
from slimbridge.conformance.suite import Bench, case, refuses, require, within
from slimbridge.distill import hard_labels
from slimbridge.parity.measure import differing, largest, relative
from slimbridge.ports import Array, Loss, Model, OptimizerSettings, tensors_in

SETTINGS = (
    OptimizerSettings(momentum=0.0),
    OptimizerSettings(momentum=0.9, weight_decay=0.1),
    OptimizerSettings(momentum=0.9, weight_decay=0.01, nesterov=True),
    OptimizerSettings(kind="adam", weight_decay=0.1),
    OptimizerSettings(kind="adamw", weight_decay=0.1),
)


def cross_entropy(bench: Bench, model: Model, labels: Array) -> Loss:
    """The loss on labels."""
    native = bench.backend.tensor(model, labels)
    return lambda result: {"loss": hard_labels(bench.backend.ops, tensors_in(result.output)[0], native)}


def softmax_gradient(weight: Array, bias: Array, x: Array, labels: Array) -> dict[str, Array]:
    """Gradient of the mean cross entropy of a linear layer: (softmax - one_hot) / N times the inputs."""
    logits = x @ weight.T + bias
    exponent = np.exp(logits - logits.max(1, keepdims=True))
    error = (exponent / exponent.sum(1, keepdims=True) - np.eye(len(bias))[labels]) / len(x)
    return {"weight": error.T @ x, "bias": error.sum(0)}


class Oracle:
    """One optimizer step in NumPy.

    Source: Sutskever et al. 2013 in PyTorch's form (velocity = momentum * velocity + gradient; step lr * velocity),
    Kingma and Ba 2015, Loshchilov and Hutter 2019.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self.settings = settings
        self.slots: dict[str, list[Array]] = {}
        self.count = 0

    def step(self, weights: dict[str, Array], gradients: dict[str, Array], lr: float) -> dict[str, Array]:
        """The weights after one step."""
        self.count += 1
        return {name: self._one(name, weights[name], gradients[name], lr) for name in weights}

    def _one(self, name: str, weight: Array, gradient: Array, lr: float) -> Array:
        s = self.settings
        if s.kind == "adamw":
            weight = weight * (1 - lr * s.weight_decay)
        else:
            gradient = gradient + s.weight_decay * weight
        slots = self.slots.setdefault(name, [np.zeros_like(weight), np.zeros_like(weight)])
        if s.kind == "sgd":
            slots[0] = s.momentum * slots[0] + gradient
            return np.asarray(weight - lr * (gradient + s.momentum * slots[0] if s.nesterov else slots[0]))
        slots[0] = s.betas[0] * slots[0] + (1 - s.betas[0]) * gradient
        slots[1] = s.betas[1] * slots[1] + (1 - s.betas[1]) * gradient**2
        first = slots[0] / (1 - s.betas[0] ** self.count)
        second = slots[1] / (1 - s.betas[1] ** self.count)
        return np.asarray(weight - lr * first / (np.sqrt(second) + s.eps))


@case("gradients: equal the formula of softmax and cross entropy")
def gradients(bench: Bench) -> None:
    """In float64, and nothing of the model is left changed."""
    model, weights, x, labels = linear(bench)
    found = bench.backend.gradients(model, [x], cross_entropy(bench, model, labels))
    for name, expected in softmax_gradient(weights["weight"], weights["bias"], x, labels).items():
        within(name, relative(found[name], expected), "gradient_float64")
    norm = topology(bench, "residual")
    before = bench.backend.read(norm)
    bench.backend.gradients(norm, [image()], cross_entropy(bench, norm, np.array([0, 1])), train=True)
    require(differing(bench.backend.read(norm), before) == 0, "gradients changed weights or statistics")


@case("optimizers: three steps equal the formulas")
def optimizers(bench: Bench) -> None:
    """SGD with momentum, weight decay, Nesterov; Adam; AdamW; a changing learning rate; float64."""
    for settings in SETTINGS:
        model, weights, x, labels = linear(bench)
        optimizer, oracle = bench.backend.make_optimizer(model, settings), Oracle(settings)
        for lr in (0.1, 0.05, 0.2):
            optimizer.set_lr(lr)
            bench.backend.train_step(model, optimizer, [x], cross_entropy(bench, model, labels))
            gradient = softmax_gradient(weights["weight"], weights["bias"], x, labels)
            weights = oracle.step(weights, gradient, lr)
        found = bench.backend.read(model)
        for name, expected in weights.items():
            within(f"{settings.kind} {name}", relative(found[name], expected), "gradient_float64")


@case("optimizers: saved state continues exactly")
def optimizer_state(bench: Bench) -> None:
    """Two steps, then one more: with the old optimizer, and with a new one that takes its state."""
    backend, labels = bench.backend, np.array([1, 2])
    for settings in SETTINGS:
        model = topology(bench, "residual")
        optimizer = backend.make_optimizer(model, settings)
        optimizer.set_lr(0.05)
        for _ in range(2):
            backend.train_step(model, optimizer, [image()], cross_entropy(bench, model, labels))
        twin = backend.write(topology(bench, "residual"), backend.read(model))
        other = backend.make_optimizer(twin, settings)
        other.set_lr(0.05)
        other.load_state(optimizer.state())
        for side, steps in ((model, optimizer), (twin, other)):
            backend.train_step(side, steps, [image()], cross_entropy(bench, side, labels))
        wrong = differing(backend.read(model), backend.read(twin))
        require(wrong == 0, f"{settings.kind}, momentum {settings.momentum}: {wrong} entries differ")


@case("normalisation: a step updates the running statistics, the variance unbiased")
def batch_norm_step(bench: Bench) -> None:
    """New = 0.9 * old + 0.1 * batch statistic, the variance divided by n - 1; float32 and float64."""
    for dtype, row in (("float32", "statistics"), ("float64", "statistics_float64")):
        nn = bench.backend.nn
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(1), nn.Linear(48, 2))
        model = bench.backend.place(model, bench.device, dtype)  # type: ignore[arg-type]
        old = {"0.running_mean": random(3, seed=1), "0.running_var": np.abs(random(3, seed=2)) + 1}
        bench.backend.write(model, old, partial=True)
        x = (random(4, 3, 4, 4) * 3 + 1).astype(dtype)
        optimizer = bench.backend.make_optimizer(model, OptimizerSettings())
        optimizer.set_lr(0.1)
        bench.backend.train_step(model, optimizer, [x], cross_entropy(bench, model, np.array([0, 1, 1, 0])))
        found, x = bench.backend.read(model), x.astype(np.float64)
        expected = {"mean": x.mean((0, 2, 3)), "var": x.var((0, 2, 3), ddof=1)}
        for name, value in expected.items():
            key = f"0.running_{name}"
            wanted = 0.9 * old[key].astype(np.float64) + 0.1 * value
            within(f"{key}, {dtype}", relative(found[key], wanted), row)


@case("training: a loss that is not finite stops before the step")
def not_finite(bench: Bench) -> None:
    """The term is named and the weights are as they were."""
    model, weights, x, labels = linear(bench)
    optimizer = bench.backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    refuses(
        "NaN input",
        lambda: bench.backend.train_step(model, optimizer, [x * np.nan], cross_entropy(bench, model, labels)),
    )
    wrong = max(largest(bench.backend.read(model)[name], weights[name]) for name in weights)
    require(wrong == 0, "the weights changed")


@case("training: equal seeds give equal runs, dropout included")
def seeds(bench: Bench) -> None:
    """Two trainings of a model with dropout; another seed gives another."""
    results = [_dropout_run(bench, seed) for seed in (7, 7, 8)]
    require(differing(results[0], results[1]) == 0, "the same seed gave two results")
    require(differing(results[0], results[2]) > 0, "the seed has no effect")


def _dropout_run(bench: Bench, seed: int) -> dict[str, Array]:
    nn = bench.backend.nn
    model = bench.backend.place(nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 3)), bench.device)
    shapes = {name: array.shape for name, array in bench.backend.read(model).items()}
    model = bench.backend.write(model, {name: random(*shape, seed=5) for name, shape in shapes.items()})
    optimizer = bench.backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    bench.backend.seed(seed)
    for _ in range(2):
        labels = np.array([0, 1, 2, 0])
        bench.backend.train_step(model, optimizer, [random(4, 6)], cross_entropy(bench, model, labels))
    return bench.backend.read(model)


def linear(bench: Bench) -> tuple[Any, dict[str, Array], Array, Array]:
    """A float64 linear layer, its weights, a batch and labels."""
    model = bench.backend.place(bench.backend.nn.Linear(4, 3), bench.device, "float64")
    weights = {"weight": random(3, 4, seed=1).astype(np.float64), "bias": random(3, seed=2).astype(np.float64)}
    model = bench.backend.write(model, weights)
    return model, weights, random(6, 4, seed=3).astype(np.float64), np.array([0, 1, 2, 0, 1, 2])
