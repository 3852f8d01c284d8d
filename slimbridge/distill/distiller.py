"""Distillation: resolve the loss against both models, then evaluate it at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slimbridge.decisions import DistillDecision, LossTerm
from slimbridge.errors import ModelError, nearest
from slimbridge.plan.registries import LOSSES
from slimbridge.plan.schema import DistillStage, LossSection
from slimbridge.ports import Array, Backend, Model, Ops, Pass, Tensor, tensors_in


class Distiller:
    """Carries out one distill stage: `decide` checks both models, `terms` is the loss that training minimises."""

    def __init__(self, stage: DistillStage) -> None:
        self.stage = stage

    def paths(self, side: str) -> tuple[str, ...]:
        """Layer paths to capture on one side, "student" or "teacher", each once, in order."""
        return tuple(dict.fromkeys(getattr(loss, side) for loss in self.stage.losses if getattr(loss, side)))

    @property
    def needs_teacher(self) -> bool:
        """Does any term look at the teacher?"""
        return any(LOSSES.get(loss.loss).against != "labels" for loss in self.stage.losses)

    @property
    def needs_labels(self) -> bool:
        """Does any term look at the labels?"""
        return any(LOSSES.get(loss.loss).against == "labels" for loss in self.stage.losses)

    def decide(
        self, backend: Backend, student: Model, teacher: Model, teacher_digest: str, example: Sequence[Array]
    ) -> DistillDecision:
        """Run both models once and resolve the terms.

        Args:
            backend: of both models.
            student, teacher: left as they are.
            teacher_digest: digest of the teacher's weights.
            example: inputs of one forward pass.

        Raises:
            ModelError: a path does not exist, or shapes do not fit; both shapes are named.
        """
        taught = backend.forward(student, example, capture=self.paths("student"))
        teaching = backend.forward(teacher, example, capture=self.paths("teacher"))
        if self.needs_teacher:
            shapes = [_shape(backend.ops, tensors_in(side.output)[0]) for side in (taught, teaching)]
            if shapes[0] != shapes[1]:
                raise ModelError(
                    f"distill: student's output has shape {shapes[0]}, teacher's {shapes[1]}; must be equal"
                )
        terms = tuple(self._term(loss, taught, teaching, backend.ops) for loss in self.stage.losses)
        model = self.stage.teacher.model
        name = model if isinstance(model, str) else model.name
        return DistillDecision(teacher=name, teacher_digest=teacher_digest, terms=terms)

    def _term(self, loss: LossSection, taught: Pass, teaching: Pass, ops: Ops) -> LossTerm:
        entry = LOSSES.get(loss.loss)
        shape = None
        if entry.against == "feature":
            shape, other = _shape(ops, taught.features[loss.student]), _shape(ops, teaching.features[loss.teacher])  # type: ignore[index]
            if shape != other:
                raise ModelError(
                    f"distill: loss '{loss.loss}': student's '{loss.student}' has shape {shape}, teacher's "
                    f"'{loss.teacher}' {other}; they must be equal (keep the width with the prune stage's "
                    "ignored_layers, or choose another layer)"
                )
        temperature = (loss.temperature or 4.0) if entry.uses_temperature else None
        return LossTerm(
            loss=loss.loss,
            weight=loss.weight,
            temperature=temperature,
            student=loss.student,
            teacher=loss.teacher,
            shape=shape,
        )


def terms(
    decision: DistillDecision, ops: Ops, student: Pass, teacher: Pass | None, labels: Tensor
) -> Mapping[str, Tensor]:
    """The weighted terms of one step, by name.

    Args:
        decision: the resolved terms.
        ops: the backend's operations.
        student: pass in train mode with gradients; logits (N, classes).
        teacher: pass without gradients; None when no term looks at it.
        labels: integers, shape (N,).

    Returns:
        "loss" or "loss:student layer" -> scalar.
    """
    result: dict[str, Tensor] = {}
    for term in decision.terms:
        entry = LOSSES.get(term.loss)
        name = f"{term.loss}:{term.student}" if term.student else term.loss
        ours, other = _sides(term, entry.against, student, teacher, labels)
        options = {"temperature": term.temperature} if entry.uses_temperature else {}
        value = entry.function(ops, ours, other, **options) * term.weight
        result[name] = result[name] + value if name in result else value
    return result


def _sides(term: LossTerm, against: str, student: Pass, teacher: Pass | None, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = tensors_in(student.output)[0]
    if against == "labels":
        return logits, labels
    if teacher is None:
        raise ModelError(f"distill: loss '{term.loss}' needs a teacher's pass")
    if against == "teacher":
        return logits, tensors_in(teacher.output)[0]
    return student.features[str(term.student)], teacher.features[str(term.teacher)]


def _shape(ops: Ops, tensor: Tensor) -> tuple[int, ...]:
    return tuple(ops.shape(tensor))[1:]


def missing_paths(paths: Sequence[str], existing: Sequence[str], side: str) -> list[str]:
    """One line for each path that a model does not have."""
    return [f"{side} has no layer '{path}'{nearest(path, existing)}" for path in paths if path not in existing]
