"""The same numbers on both frameworks: forward, gradients, training steps, decisions, integer weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from slimbridge import zoo
from slimbridge.distill import Distiller, hard_labels, soft_labels
from slimbridge.graph import cost_of, find_units
from slimbridge.parity import differing, largest, relative, tolerance
from slimbridge.plan import DistillStage, PruneStage, QuantizeStage
from slimbridge.ports import Array, Backend, DType, Loss, Model, OptimizerSettings, tensors_in
from slimbridge.prune import Pruner
from slimbridge.quantize.fold import fold_weights
from slimbridge.quantize.quantizer import apply, integer_weights
from slimbridge.quantize_stage import decide_grids
from slimbridge.weights import digest_of

BATCH, CLASSES, STEPS = 8, 10, 10
# MobileNetV3-Small is a net of the paper, for large images, and drops out at random.
SMALL = tuple(sorted(name for name in zoo.models() if name.endswith("_small") and name != "mobilenet_v3_small"))
SIDES = ("torch_backend", "paddle_backend")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((STEPS, BATCH, 3, 8, 8))
Y = RNG.integers(0, CLASSES, (STEPS, BATCH))


def build(backend: Backend, name: str, dtype: DType = "float32", width: int = 8) -> Model:
    """A narrow model of the zoo; its running statistics are not the trivial ones."""
    model = zoo.build(name, backend, CLASSES, seed=1, width=width)
    vectors = {n: array for n, array in backend.read(model).items() if array.ndim == 1}
    arrays = {n: array + np.linspace(0, 0.3, array.size).astype(np.float32) for n, array in vectors.items()}
    return backend.place(backend.write(model, arrays, partial=True), "cpu", dtype)


def labels_loss(backend: Backend, model: Model, labels: Array) -> Loss:
    native = backend.tensor(model, labels)
    return lambda result: {"loss": hard_labels(backend.ops, tensors_in(result.output)[0], native)}


def logits(backend: Backend, model: Model, x: Array) -> Array:
    return backend.ops.numpy(tensors_in(backend.forward(model, [x]).output)[0])


@pytest.fixture(params=SIDES)
def side(request: Any) -> Backend:
    found: Backend = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("name", SMALL)
def test_weights_forward_and_gradients(torch_backend: Backend, paddle_backend: Backend, name: str) -> None:
    x, y = X[0].astype(np.float32), Y[0]
    found: list[tuple[dict[str, Array], Array, Mapping[str, Array]]] = []
    for backend in (torch_backend, paddle_backend):
        model = build(backend, name)
        gradients = backend.gradients(model, [x], labels_loss(backend, model, y), train=True)
        found.append((backend.read(model), logits(backend, model, x), gradients))
    (weights, output, gradients), (other_weights, other_output, other_gradients) = found
    assert digest_of(weights) == digest_of(other_weights)
    assert relative(output, other_output) <= tolerance("forward").value
    assert gradients.keys() == other_gradients.keys()
    # Some gradients are 0 but for rounding (a bias before a normalisation): the whole is the measure.
    flat, other = (np.concatenate([side[key].ravel() for key in sorted(side)]) for side in (gradients, other_gradients))
    assert relative(flat, other) <= tolerance("gradient").value


@pytest.mark.parametrize(
    ("name", "train"),
    # In train mode the last normalisations of a MobileNet see eight values on maps of one pixel: some variances are
    # next to nothing, and a rounding before them is multiplied by a thousand.
    [("resnet18_small", True), ("resnet50_small", True), ("mobilenet_v1_small", False), ("mobilenet_v2_small", False)],
)
def test_gradients_in_float64(torch_backend: Backend, paddle_backend: Backend, name: str, train: bool) -> None:
    found = []
    for backend in (torch_backend, paddle_backend):
        model = build(backend, name, "float64")
        found.append(backend.gradients(model, [X[0]], labels_loss(backend, model, Y[0]), train))
    for key, gradient in found[0].items():
        assert relative(gradient, found[1][key]) <= tolerance("gradient_float64").value, key


def trained(backend: Backend, name: str, settings: OptimizerSettings) -> tuple[dict[str, Array], list[float]]:
    """Arrays and losses of ten float64 steps."""
    model = build(backend, name, "float64")
    optimizer = backend.make_optimizer(model, settings)
    losses = []
    for step in range(STEPS):
        optimizer.set_lr(0.02 * (1 - step / STEPS))
        terms = backend.train_step(model, optimizer, [X[step]], labels_loss(backend, model, Y[step]))
        losses.append(terms["loss"])
    return backend.read(model), losses


SGD = OptimizerSettings(momentum=0.9, weight_decay=0.0005)
NESTEROV = OptimizerSettings(momentum=0.9, weight_decay=0.0005, nesterov=True)
ADAMW = OptimizerSettings(kind="adamw", weight_decay=0.01)


@pytest.mark.parametrize("settings", [SGD, NESTEROV, ADAMW], ids=["sgd", "nesterov", "adamw"])
def test_ten_steps_in_float64(torch_backend: Backend, paddle_backend: Backend, settings: OptimizerSettings) -> None:
    name = "resnet18_small"
    arrays, losses = trained(torch_backend, name, settings)
    other, other_losses = trained(paddle_backend, name, settings)
    allowed = tolerance("training_float64").value
    assert arrays.keys() == other.keys()
    assert any(key.endswith("running_var") for key in arrays)
    wrong = {key: largest(array, other[key]) for key, array in arrays.items() if largest(array, other[key]) > allowed}
    assert not wrong
    assert np.abs(np.array(losses) - np.array(other_losses)).max() <= allowed
    start = torch_backend.read(build(torch_backend, name, "float64"))
    moved = min(largest(array, start[key]) for key, array in arrays.items())
    assert moved > allowed, "training must move every array by more than the tolerance, or nothing was compared"


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("importance", ["l1_norm", "l2_norm"])
def test_equal_weights_give_equal_decisions(
    torch_backend: Backend, paddle_backend: Backend, name: str, importance: str
) -> None:
    decisions, graphs = [], []
    for backend in (torch_backend, paddle_backend):
        model = build(backend, name)
        graphs.append(backend.trace(model, [X[0][:1].astype(np.float32)]))
        stage = PruneStage(pruning_ratio=0.4, importance=importance)
        decisions.append(Pruner(stage).decide(graphs[-1], backend.read(model)))
    assert decisions[0].digest() == decisions[1].digest()
    assert cost_of(graphs[0]) == cost_of(graphs[1])
    groups = [[(group.layers, group.units.size) for group in find_units(graph).groups()] for graph in graphs]
    assert groups[0] == groups[1]
    assert sum(len(choice.removed) for choice in decisions[0].groups) > 0


@pytest.mark.parametrize("name", SMALL)
def test_a_decision_of_one_framework_serves_the_other(
    torch_backend: Backend, paddle_backend: Backend, name: str
) -> None:
    x = X[0].astype(np.float32)
    model = build(torch_backend, name)
    pruned, decision = Pruner(PruneStage(pruning_ratio=0.5)).prune(torch_backend, model, [x[:1]])
    other = paddle_backend.remove_channels(build(paddle_backend, name), decision)
    assert differing(torch_backend.read(pruned), paddle_backend.read(other)) <= tolerance("integers").value
    macs = [cost_of(b.trace(m, [x[:1]])).macs for b, m in ((torch_backend, pruned), (paddle_backend, other))]
    assert abs(macs[0] - macs[1]) <= tolerance("macs").value
    assert macs[0] < cost_of(torch_backend.trace(model, [x[:1]])).macs
    assert relative(logits(torch_backend, pruned, x), logits(paddle_backend, other, x)) <= tolerance("forward").value


@pytest.mark.parametrize("name", SMALL)
def test_quantization(torch_backend: Backend, paddle_backend: Backend, name: str) -> None:
    batches = [[x.astype(np.float32)] for x in X[:3]]
    # As many samples as a run compares: over a few, one flipped rounding weighs too much.
    probe = X[:8].reshape(-1, 3, 8, 8).astype(np.float32)
    integers, steps, outputs = [], [], []
    for backend in (torch_backend, paddle_backend):
        model = build(backend, name, width=16)
        decision = decide_grids(backend, model, QuantizeStage(), [probe[:2]], batches)
        before = backend.read(model)
        integers.append(integer_weights(decision, {**before, **fold_weights(before, decision.folds)}))
        steps.append({path: grid.step[0] for path, grid in decision.activations.items()})
        outputs.append(logits(backend, apply(backend, model, decision), probe))
    assert integers[0]
    assert differing(integers[0], integers[1]) <= tolerance("integers").value
    assert steps[0].keys() == steps[1].keys()
    for path, step in steps[0].items():
        assert abs(step - steps[1][path]) / step <= tolerance("activation_step").value, path
    assert relative(outputs[0], outputs[1]) <= tolerance("forward_quantized").value


def test_a_distillation_step(torch_backend: Backend, paddle_backend: Backend) -> None:
    """Gradients of the student on soft labels of a teacher with other weights, float64; the teacher takes none."""
    found = []
    for backend in (torch_backend, paddle_backend):
        student = build(backend, "resnet18_small", "float64")
        teacher = backend.place(zoo.build("resnet18_small", backend, CLASSES, seed=2, width=12), "cpu", "float64")
        taught = backend.forward(teacher, [X[0]]).output

        def loss(result: Any, backend: Backend = backend, taught: Any = taught) -> dict[str, Any]:
            return {"soft": soft_labels(backend.ops, result.output, taught, 3.0)}

        found.append(backend.gradients(student, [X[0]], loss))
    for key, gradient in found[0].items():
        assert relative(gradient, found[1][key]) <= tolerance("gradient_float64").value, key


def test_distill_decisions(torch_backend: Backend, paddle_backend: Backend) -> None:
    losses = [{"loss": "soft_labels"}, {"loss": "l2_feature", "student": "layer4", "teacher": "layer4"}]
    stage = DistillStage.model_validate({"losses": losses, "train": {"epochs": 1}})
    decisions = []
    for backend in (torch_backend, paddle_backend):
        student, teacher = (build(backend, "resnet18_small") for _ in range(2))
        decisions.append(
            Distiller(stage).decide(backend, student, teacher, digest_of(backend.read(teacher)), [X[0][:1]])
        )
    assert decisions[0] == decisions[1]
    assert decisions[0].terms[1].shape == (64, 1, 1)


def test_the_zoo_runs_on_one_sample(side: Backend) -> None:
    """Every small model, the smallest batch: a row of its own output in a larger one."""
    for name in SMALL:
        model = build(side, name)
        x = X[0].astype(np.float32)
        assert relative(logits(side, model, x[:1]), logits(side, model, x)[:1]) <= tolerance("forward").value, name
