"""What all sections of a plan share, and how to train."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from slimbridge.discovery import backend_names
from slimbridge.errors import listed, nearest
from slimbridge.plan.registries import ENTRY_IMPORTANCES, IMPORTANCES, LOSSES, OBSERVERS, SCHEDULES
from slimbridge.plan.registry import Registry


def _named_in(registry: Registry[Any]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in registry.names():
            raise ValueError(registry.unknown(name))
        return name

    return AfterValidator(check)


def _backend(name: str) -> str:
    if name not in backend_names():
        known = backend_names()
        raise ValueError(f"unknown backend '{name}'{nearest(name, known)}; allowed: {listed(known)}")
    return name


BackendName = Annotated[str, AfterValidator(_backend)]
ImportanceName = Annotated[str, _named_in(IMPORTANCES)]
EntryImportanceName = Annotated[str, _named_in(ENTRY_IMPORTANCES)]
ObserverName = Annotated[str, _named_in(OBSERVERS)]
LossName = Annotated[str, _named_in(LOSSES)]
ScheduleName = Annotated[str, _named_in(SCHEDULES)]
Positive = Annotated[int, Field(ge=1)]


def _plain(value: Any) -> Any:
    if not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"found a {type(value).__name__}; allowed: a number, a string, true or false")
    return value


Options: TypeAlias = dict[str, Annotated[Any, AfterValidator(_plain)]]


class Section(BaseModel):
    """A part of a plan: unknown keys and unfitting types are refused; it cannot be changed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """One definition for all frameworks.

    Attributes:
        kind: sgd, adam (weight decay added to the gradient) or adamw (decoupled).
        momentum: share of the old velocity kept; sgd only.
        nesterov: sgd only.
        weight_decay: 0 or more.
        betas: decays of the moments; adam and adamw only.
        eps: offset of the denominator; adam and adamw only.
    """

    kind: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.0001
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8

    @model_validator(mode="after")
    def _nesterov(self) -> OptimizerSection:
        if self.nesterov and (self.kind != "sgd" or self.momentum == 0):
            raise ValueError("nesterov needs kind sgd with a momentum above 0")
        return self


class TrainSection(Section):
    """How to train.

    Attributes:
        epochs: passes over the training data.
        batch_size: most samples a step; an epoch is cut into as few batches as that allows, of nearly equal size.
        learning_rate: of the first step after warm-up.
        schedule: how the learning rate changes, a registered name.
        warmup_epochs: epochs over which the learning rate rises linearly from 0.
        optimizer: how a step is made.
    """

    epochs: Positive
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 0.05
    schedule: ScheduleName = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    optimizer: OptimizerSection = OptimizerSection()

    @model_validator(mode="after")
    def _warm(self) -> TrainSection:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be less than epochs {self.epochs}")
        return self
