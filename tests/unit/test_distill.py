"""Distillation: each loss and its gradient against the frameworks' own, and the distiller's checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from slimbridge.decisions import DistillDecision, LossTerm
from slimbridge.distill import Distiller, hard_labels, l2_feature, missing_paths, soft_labels, terms
from slimbridge.errors import ModelError
from slimbridge.parity import relative, tolerance
from slimbridge.plan import DistillStage
from slimbridge.ports import Array, Backend, Device, Pass

RNG = np.random.default_rng(2)
STUDENT, TEACHER = RNG.standard_normal((7, 5)) * 3, RNG.standard_normal((7, 5)) * 3
LABELS = RNG.integers(0, 5, 7)
FEATURES = RNG.standard_normal((2, 3, 4, 5)), RNG.standard_normal((2, 3, 4, 5))

Reference = Callable[[Any], Any]


def soft_reference(temperature: float) -> Reference:
    def compute(student: Any) -> Any:
        log_q = functional.log_softmax(student / temperature, -1)
        p = functional.softmax(torch.from_numpy(TEACHER) / temperature, -1)
        return functional.kl_div(log_q, p, reduction="batchmean") * temperature**2

    return compute


CASES: dict[str, tuple[Array, Callable[[Any, Any, Any], Any], Array, Reference]] = {
    "hard labels": (
        STUDENT,
        hard_labels,
        LABELS,
        lambda student: functional.cross_entropy(student, torch.from_numpy(LABELS)),
    ),
    "features": (
        FEATURES[0],
        l2_feature,
        FEATURES[1],
        lambda student: functional.mse_loss(student, torch.from_numpy(FEATURES[1])),
    ),
    **{
        f"soft labels, temperature {t}": (
            STUDENT,
            lambda ops, student, teacher, t=t: soft_labels(ops, student, teacher, t),
            TEACHER,
            soft_reference(t),
        )
        for t in (1.0, 4.0, 20.0)
    },
}


class Free:
    """A model whose output on unit vectors is its weight: a loss's gradient in the output is that of the weight."""

    def __init__(self, backend: Backend, device: Device, values: Array) -> None:
        rows, columns = values.shape[0], values.size // values.shape[0]
        self.backend = backend
        self.model = backend.place(backend.nn.Linear(rows, columns), device, "float64")
        self.model = backend.write(self.model, {"weight": values.reshape(rows, columns).T, "bias": np.zeros(columns)})
        self.shape = values.shape

    def evaluate(self, loss: Callable[[Any], Any]) -> tuple[float, Array]:
        """Value, and gradient in the shape of the output."""
        values: list[float] = []

        def terms_of(result: Pass) -> dict[str, Any]:
            value = loss(self.backend.ops.reshape(result.output, self.shape))
            values.append(float(self.backend.ops.numpy(value)))
            return {"loss": value}

        gradient = self.backend.gradients(self.model, [np.eye(self.shape[0])], terms_of)["weight"]
        return values[0], gradient.T.reshape(self.shape)


@pytest.mark.parametrize("name", list(CASES))
def test_a_loss_and_its_gradient(backend: Backend, device: Device, name: str) -> None:
    """Against PyTorch's own implementation in float64, on either backend."""
    student, function, other, reference = CASES[name]
    free = Free(backend, device, student)
    native = backend.tensor(free.model, other)
    value, gradient = free.evaluate(lambda output: function(backend.ops, output, native))
    leaf = torch.tensor(student, requires_grad=True)
    expected = reference(leaf)
    (wanted,) = torch.autograd.grad(expected, leaf)
    allowed = tolerance("gradient_float64").value
    assert relative(np.array(value), expected.detach().numpy()) <= allowed
    assert relative(gradient, wanted.numpy()) <= allowed


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_logits_do_not_overflow(backend: Backend, device: Device, size: float) -> None:
    free = Free(backend, device, STUDENT * size)
    labels, teacher = backend.tensor(free.model, LABELS), backend.tensor(free.model, TEACHER * size)
    for loss in (
        lambda x: hard_labels(backend.ops, x, labels),
        lambda x: soft_labels(backend.ops, x, teacher, 1.0),
    ):
        value, gradient = free.evaluate(loss)
        assert np.isfinite(value)
        assert value >= 0
        assert np.isfinite(gradient).all()


def test_equal_outputs_cost_nothing(backend: Backend, device: Device) -> None:
    free = Free(backend, device, STUDENT)
    same = backend.tensor(free.model, STUDENT)
    for function in (soft_labels, l2_feature):
        value, gradient = free.evaluate(lambda x, function=function: function(backend.ops, x, same))
        assert abs(value) <= tolerance("statistics_float64").value
        assert np.abs(gradient).max() <= tolerance("statistics_float64").value


# The distiller


def stage(*losses: dict[str, Any]) -> DistillStage:
    return DistillStage.model_validate({"losses": list(losses), "train": {"epochs": 1}})


def net(backend: Backend, width: int = 4, classes: int = 5) -> Any:
    nn = backend.nn
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(width * 4, classes))


X = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)
FEATURE = {"loss": "l2_feature", "student": "1", "teacher": "1", "weight": 2.0}


def test_the_terms_are_resolved(backend: Backend) -> None:
    losses = stage({"loss": "hard_labels", "weight": 0.5}, {"loss": "soft_labels", "temperature": 3.0}, FEATURE)
    decision = Distiller(losses).decide(backend, net(backend), net(backend), "abc", [X])
    assert decision.teacher == "baseline"
    assert decision.teacher_digest == "abc"
    assert [(t.loss, t.weight, t.temperature, t.shape) for t in decision.terms] == [
        ("hard_labels", 0.5, None, None),
        ("soft_labels", 1.0, 3.0, None),
        ("l2_feature", 2.0, None, (4, 2, 2)),
    ]


def test_a_default_temperature_is_written_down(torch_backend: Backend) -> None:
    decision = Distiller(stage({"loss": "soft_labels"})).decide(
        torch_backend, net(torch_backend), net(torch_backend), "", [X]
    )
    assert decision.terms[0].temperature == 4.0


def test_weighted_terms_by_name(backend: Backend) -> None:
    decision = DistillDecision(
        teacher="baseline",
        teacher_digest="",
        terms=(
            LossTerm(loss="hard_labels", weight=0.5),
            LossTerm(loss="soft_labels", weight=0.25, temperature=2.0),
            LossTerm(loss="soft_labels", weight=0.25, temperature=4.0),
            LossTerm(loss="l2_feature", weight=3.0, student="a", teacher="b", shape=(3, 4, 5)),
        ),
    )
    model = backend.place(backend.nn.Linear(2, 2), "cpu", "float64")
    native = [backend.tensor(model, array) for array in (STUDENT, TEACHER, LABELS, *FEATURES)]
    student, teacher = Pass(native[0], {"a": native[3]}), Pass(native[1], {"b": native[4]})
    found = terms(decision, backend.ops, student, teacher, native[2])
    leaf = torch.from_numpy(STUDENT)
    expected = {
        "hard_labels": 0.5 * CASES["hard labels"][3](leaf),
        "soft_labels": 0.25 * (soft_reference(2.0)(leaf) + soft_reference(4.0)(leaf)),
        "l2_feature:a": 3.0 * CASES["features"][3](torch.from_numpy(FEATURES[0])),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(backend.ops.numpy(found[name]), value.numpy()) <= tolerance("gradient_float64").value


def test_features_of_unequal_shape_are_both_printed(backend: Backend) -> None:
    with pytest.raises(ModelError) as caught:
        Distiller(stage(FEATURE)).decide(backend, net(backend, 4), net(backend, 6), "", [X])
    message = str(caught.value)
    assert "(4, 2, 2)" in message
    assert "(6, 2, 2)" in message
    assert len(message.splitlines()) <= 2


def test_outputs_of_unequal_shape_are_both_printed(torch_backend: Backend) -> None:
    with pytest.raises(ModelError, match=r"student's output has shape \(5,\), teacher's \(6,\)"):
        Distiller(stage({"loss": "soft_labels"})).decide(
            torch_backend, net(torch_backend), net(torch_backend, classes=6), "", [X]
        )


def test_a_layer_that_does_not_exist(backend: Backend) -> None:
    wrong = stage({**FEATURE, "student": "layer"})
    with pytest.raises(ModelError, match=r"'layer'"):
        Distiller(wrong).decide(backend, net(backend), net(backend), "", [X])
    assert missing_paths(["layer4", "fc"], ["layer1", "fc"], "student") == [
        "student has no layer 'layer4' (did you mean 'layer1'?)"
    ]


def test_labels_alone_need_no_teacher() -> None:
    assert not Distiller(stage({"loss": "hard_labels"})).needs_teacher
    assert Distiller(stage({"loss": "hard_labels"}, FEATURE)).needs_teacher
    two = Distiller(stage(FEATURE, FEATURE, {**FEATURE, "student": "0"}))
    assert two.paths("student") == ("1", "0")
    assert two.paths("teacher") == ("1",)


def test_a_teacher_that_is_needed_and_missing(torch_backend: Backend) -> None:
    decision = DistillDecision(teacher="x", teacher_digest="", terms=(LossTerm(loss="soft_labels", weight=1.0),))
    with pytest.raises(ModelError, match=r"'soft_labels' needs a teacher"):
        terms(decision, torch_backend.ops, Pass(torch.zeros(2, 3)), None, torch.zeros(2))
