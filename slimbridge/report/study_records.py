"""What a study leaves: one record for each run, with what was varied and how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slimbridge.errors import RunError
from slimbridge.report.records import RunReport, StageRecord

ON_THE_CURVE = ("baseline", "prune", "distill", "finetune")
"""Kinds of stages whose MACs and metric are a point; masks and simulated integers leave the MACs as they are."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class StudyStage(_Record):
    """The model after a stage of a run; units as in `StageRecord`, latency the median of a pass in milliseconds."""

    name: str
    kind: Literal["baseline", "prune", "sparsify", "distill", "quantize", "finetune"]
    metric: float
    macs: int
    parameters: int
    size_bytes: int
    latency_ms: float

    @classmethod
    def of(cls, stage: StageRecord) -> StudyStage:
        """The stage of a run's report."""
        same = {key: getattr(stage, key) for key in ("name", "kind", "metric", "macs", "parameters", "size_bytes")}
        return cls(**same, latency_ms=stage.latency.median_ms)


class StudyRun(_Record):
    """One run of a study.

    Attributes:
        combination: its name, made of the varied values; runs that differ in backend and seed alone share it.
        values: path in the plan -> value.
        backend: its name.
        seed: the plan's seed.
        folder: of the run, below the study's.
        stages: none when it failed.
        error: the line it failed with, None when it is complete.
    """

    combination: str
    values: dict[str, Any]
    backend: str
    seed: int
    folder: str
    stages: tuple[StudyStage, ...] = ()
    error: str | None = None


class Study(_Record):
    """Many runs of one plan.

    Attributes:
        plan: its name.
        metric_name: e.g. "accuracy".
        metric_is_share: is it 0..1, to be shown as per cent?
        runs: in the order they were run.
    """

    plan: str
    metric_name: str = "metric"
    metric_is_share: bool = True
    runs: tuple[StudyRun, ...] = ()

    @property
    def failed(self) -> tuple[StudyRun, ...]:
        """The runs that are not complete."""
        return tuple(run for run in self.runs if run.error is not None)

    def __str__(self) -> str:
        """The table that a terminal shows."""
        from slimbridge.report.study_table import render_study

        return render_study(self)


@dataclass(frozen=True)
class Figure:
    """A mean over seeds, the sample standard deviation (n - 1; None for a single seed), and the number of seeds."""

    mean: float
    spread: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Of at least one value."""
        finite = all(isfinite(value) for value in values)
        spread = stdev(values) if len(values) > 1 and finite else None
        return cls(fmean(values) if finite else float("nan"), spread, len(values))


@dataclass(frozen=True)
class Point:
    """The mean model after one stage of a line."""

    stage: str
    kind: str
    metric: Figure
    macs: Figure
    parameters: Figure
    size_bytes: Figure
    latency_ms: Figure


@dataclass(frozen=True)
class Line:
    """One combination on one backend, over its seeds."""

    combination: str
    values: dict[str, Any]
    backend: str
    points: tuple[Point, ...]

    @property
    def curve(self) -> tuple[Point, ...]:
        """The points of the curve of the metric against MACs."""
        return tuple(point for point in self.points if point.kind in ON_THE_CURVE)


def lines_of(study: Study) -> tuple[Line, ...]:
    """The complete runs, those that differ in their seed alone together, in the order they were run."""
    together: dict[tuple[str, str], list[StudyRun]] = {}
    for run in study.runs:
        if run.error is None:
            together.setdefault((run.combination, run.backend), []).append(run)
    return tuple(
        Line(
            name,
            runs[0].values,
            backend,
            tuple(_point(stages) for stages in zip(*(r.stages for r in runs), strict=True)),
        )
        for (name, backend), runs in together.items()
    )


def _point(stages: Sequence[StudyStage]) -> Point:
    figures = {
        key: Figure.of([float(getattr(stage, key)) for stage in stages])
        for key in ("metric", "macs", "parameters", "size_bytes", "latency_ms")
    }
    return Point(stages[0].name, stages[0].kind, **figures)


def seeds_of(study: Study) -> tuple[int, ...]:
    """The seeds, each once."""
    return tuple(Counter(run.seed for run in study.runs))


def study_run(report: RunReport, **given: Any) -> StudyRun:
    """A complete run's record; `given` are the fields that its report does not know."""
    stages = tuple(StudyStage.of(stage) for stage in report.stages)
    return StudyRun(backend=report.backend, stages=stages, **given)


def read_study(path: Path) -> Study:
    """Read a study.json; RunError when it is missing, truncated or something else."""
    try:
        return Study.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path}: not a study: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
