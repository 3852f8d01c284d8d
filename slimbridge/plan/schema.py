"""The plan: what a user writes, checked, with every default made visible."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from slimbridge.plan.base import (
    BackendName,
    LossName,
    OptimizerSection,
    Options,
    Positive,
    Section,
    TrainSection,
)
from slimbridge.plan.pruning import (
    GmpSection,
    NativeSection,
    PreparationSection,
    PruneStage,
    SensitivitySection,
    SparsifyStage,
    TargetSection,
)
from slimbridge.plan.quantizing import NativeQuantizeSection, QatSection, QuantizeStage
from slimbridge.plan.registries import LOSSES


class ModelSection(Section):
    """A zoo model; leave the section out to pass a model of your own.

    Attributes:
        name: a zoo model's name.
        num_classes: outputs of the last layer.
        in_channels: input channels; None is the model's own default.
        seed: of the initial weights, which are equal on all frameworks.
        options: further options of that model.
    """

    name: str
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    in_channels: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    options: Options = {}

    @model_validator(mode="after")
    def _own_options(self) -> ModelSection:
        own = ("backend", *type(self).model_fields)
        for name in self.options:
            if name in own:
                raise ValueError(f"'{name}' is no option of a model: it stands beside 'options', not in it")
        return self


class DataSection(Section):
    """A shipped data set; leave the section out to pass data of your own.

    Attributes:
        name: a data set's name.
        options: its options.
    """

    name: str
    options: Options = {}


class BaselineSection(Section):
    """What happens to the model before the first stage: weights are loaded from a file, or it is trained, or both.

    Attributes:
        weights: a .safetensors file with canonical names.
        train: how to train.
    """

    weights: str | None = None
    train: TrainSection | None = None


class LossSection(Section):
    """One term of the loss.

    Attributes:
        loss: a registered name.
        weight: factor of the term.
        temperature: softening of the logits, for losses that take it; None is the loss's own default.
        student, teacher: layer paths, for losses on feature maps.
    """

    loss: LossName
    weight: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0, le=1000)] | None = None
    student: str | None = None
    teacher: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> LossSection:
        entry = LOSSES.get(self.loss)
        if entry.against == "feature" and (self.student is None or self.teacher is None):
            raise ValueError(f"loss '{self.loss}' compares features: it needs 'student' and 'teacher' layer paths")
        if entry.against != "feature" and (self.student or self.teacher):
            raise ValueError(f"loss '{self.loss}' takes no 'student' or 'teacher' layer")
        if self.temperature is not None and not entry.uses_temperature:
            raise ValueError(f"loss '{self.loss}' takes no 'temperature'")
        return self


class TeacherSection(Section):
    """Who teaches.

    Attributes:
        model: "baseline", the model as it was before the first stage, or a model section.
        weights: a .safetensors file, for a model section.
    """

    model: Literal["baseline"] | ModelSection = "baseline"
    weights: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> TeacherSection:
        if self.model == "baseline" and self.weights is not None:
            raise ValueError("the baseline has its weights already: leave 'weights' out, or name a zoo model")
        if self.model != "baseline" and self.weights is None:
            raise ValueError("a teacher from the zoo needs 'weights', a .safetensors file")
        return self


class DistillStage(Section):
    """Train the model, the student, against a teacher.

    Attributes:
        kind: "distill".
        teacher: who teaches.
        losses: the terms; their weighted sum is minimised.
        train: how to train.
    """

    kind: Literal["distill"] = "distill"
    teacher: TeacherSection = TeacherSection()
    losses: Annotated[tuple[LossSection, ...], Field(min_length=1, strict=False)]
    train: TrainSection


class FinetuneStage(Section):
    """Train the model as it is, on the task's own loss.

    Attributes:
        kind: "finetune".
        train: how to train.
    """

    kind: Literal["finetune"] = "finetune"
    train: TrainSection


Stage: TypeAlias = PruneStage | SparsifyStage | DistillStage | QuantizeStage | FinetuneStage


class Plan(Section):
    """One compression plan.

    Attributes:
        name: of the plan, for reports and folders: letters, digits, spaces, '_', '-', '.'; at most 80.
        model, data: from the zoo and the shipped data sets; either may be passed as an argument instead.
        task: fixes the loss on labels and the metric.
        backend: a registered backend's name; None takes the model's own, or the one named when the plan is run.
        seed: of data order, calibration and the frameworks' generators.
        device: "cpu" or "gpu".
        baseline: what happens before the first stage.
        stages: in the order they run.
    """

    name: Annotated[str, Field(pattern=r"^[\w][\w .-]{0,79}$")] = "plan"
    model: ModelSection | None = None
    data: DataSection | None = None
    task: Literal["classification"] = "classification"
    backend: BackendName | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: Literal["cpu", "gpu"] = "cpu"
    baseline: BaselineSection = BaselineSection()
    stages: Annotated[tuple[Annotated[Stage, Field(discriminator="kind")], ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _order(self) -> Plan:
        kinds = [stage.kind for stage in self.stages]
        for index, stage in enumerate(self.stages, start=1):
            named = getattr(stage, "relative_to", None)
            if isinstance(named, int) and named >= index:
                raise ValueError(
                    f"stage {index}: relative_to {named} is no earlier stage; 0 (the baseline) to {index - 1} are"
                )
        if "quantize" in kinds and kinds.index("quantize") != len(kinds) - 1:
            late = kinds[kinds.index("quantize") + 1]
            raise ValueError(
                f"stage {len(kinds)} of {len(kinds)}: '{late}' after 'quantize' would change the quantized weights; "
                "static quantization comes last, once"
            )
        return self


__all__ = [
    "BaselineSection",
    "DataSection",
    "DistillStage",
    "FinetuneStage",
    "GmpSection",
    "LossSection",
    "ModelSection",
    "NativeQuantizeSection",
    "NativeSection",
    "OptimizerSection",
    "Plan",
    "PreparationSection",
    "PruneStage",
    "QatSection",
    "QuantizeStage",
    "Section",
    "SensitivitySection",
    "SparsifyStage",
    "Stage",
    "TargetSection",
    "TeacherSection",
    "TrainSection",
]
