"""Cases on zeros that training keeps, and on losses that read parameters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from slimbridge.conformance.models import random, topology
from slimbridge.conformance.suite import Bench, case, refuses, require, within
from slimbridge.conformance.training import Oracle, cross_entropy, linear, softmax_gradient
from slimbridge.decisions import PruneDecision
from slimbridge.parity.measure import relative
from slimbridge.ports import OptimizerSettings, Pass, Tensor, tensors_in

SETTINGS = (OptimizerSettings(momentum=0.9), OptimizerSettings(kind="adam"))


@case("masks: held zeros stay zero over steps, the others train as ever")
def hold_zeros(bench: Bench) -> None:
    """Three steps against the formulas with the entries zeroed after each; lifted, they move again."""
    for settings in SETTINGS:
        model, weights, x, labels = linear(bench)
        optimizer, oracle = bench.backend.make_optimizer(model, settings), Oracle(settings)
        optimizer.set_lr(0.1)
        keep = random(*weights["weight"].shape, seed=9) > 0
        optimizer.hold_zeros({"bias": np.zeros(len(weights["bias"]), bool)})
        optimizer.hold_zeros({"weight": keep})  # replaces the call before
        for step in range(3):
            bench.backend.train_step(model, optimizer, [x], cross_entropy(bench, model, labels))
            gradient = softmax_gradient(weights["weight"], weights["bias"], x, labels)
            weights = oracle.step(weights, gradient, 0.1)
            weights["weight"] = weights["weight"] * keep
            found = bench.backend.read(model)
            wrong = int(np.count_nonzero(found["weight"][~keep]))
            require(wrong == 0, f"{settings.kind}: {wrong} held entries are not 0 after step {step + 1}")
            for name, expected in weights.items():
                within(f"{settings.kind} {name}", relative(found[name], expected), "gradient_float64")
        optimizer.hold_zeros({})
        bench.backend.train_step(model, optimizer, [x], cross_entropy(bench, model, labels))
        moved = bench.backend.read(model)["weight"][~keep]
        require(moved.all(), f"{settings.kind}: lifted, {int(np.sum(moved == 0))} entries are still 0")
        refuses("an unknown name", partial(optimizer.hold_zeros, {"wieght": keep}))
        refuses("a wrong shape", partial(optimizer.hold_zeros, {"weight": keep.T}))


@case("masks: held zeros follow their channels through surgery")
def held_and_sliced(bench: Bench) -> None:
    """The mask loses the channels that the weight loses."""
    model, weights, x, labels = linear(bench)
    keep = random(*weights["weight"].shape, seed=9) > 0
    optimizer = bench.backend.make_optimizer(model, OptimizerSettings())
    optimizer.set_lr(0.1)
    optimizer.hold_zeros({"weight": keep})
    stays = (1, 2, 3)
    decision = PruneDecision(
        importance="l1", pruning_ratio=0.25, groups=(), kept={"weight": {1: stays}}, sizes={"weight": keep.shape}
    )
    model = bench.backend.remove_channels(model, decision, optimizer)
    bench.backend.train_step(model, optimizer, [x[:, stays]], cross_entropy(bench, model, labels))
    zero = bench.backend.read(model)["weight"] == 0
    require(np.array_equal(zero, ~keep[:, stays]), "after the removal other entries are held at 0")


@case("parameters: a loss reads them in canonical layout, and its gradient flows")
def parameters(bench: Bench) -> None:
    """The sum of squares of a weight and the sum of outputs: gradient 2 w + the sum of the inputs."""
    backend, ops = bench.backend, bench.backend.ops
    model, weights, x, _ = linear(bench)

    def loss(result: Pass) -> Mapping[str, Tensor]:
        return {"squares": ops.sum(result.parameters["weight"] ** 2), "outputs": ops.sum(tensors_in(result.output)[0])}

    expected = 2 * weights["weight"] + x.sum(0)
    within("gradient", relative(backend.gradients(model, [x], loss)["weight"], expected), "gradient_float64")
    optimizer = backend.make_optimizer(model, OptimizerSettings(momentum=0.0))
    optimizer.set_lr(0.1)
    backend.train_step(model, optimizer, [x], loss)
    within("step", relative(backend.read(model)["weight"], weights["weight"] - 0.1 * expected), "gradient_float64")
    net = topology(bench, "transposed")
    found = backend.forward(net, [random(1, 3, 6, 6)]).parameters
    arrays = {name: array for name, array in backend.read(net).items() if "running_" not in name}
    require(set(found) == set(arrays), f"names differ: {sorted(set(found) ^ set(arrays))[:3]}")
    wrong = [name for name, array in arrays.items() if not np.array_equal(ops.numpy(found[name]), array)]
    require(not wrong, f"{len(wrong)} parameters differ from those read, '{wrong[:1]}' first")
