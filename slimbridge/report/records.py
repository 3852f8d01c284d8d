"""What a report holds: one record for each stage, one report for each run, one comparison for several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from slimbridge.curves import Sensitivity
from slimbridge.errors import RunError
from slimbridge.report.deploy_records import Deployment
from slimbridge.report.record import Record


class LatencyRecord(Record):
    """Median time of one forward pass and how it was measured.

    Attributes:
        median_ms: milliseconds.
        spread_ms: interquartile range, milliseconds.
        runs: passes timed, after warm-up.
        batch: samples a pass.
        threads: threads the framework could use.
        how: runtime and number format, e.g. "torch 2.13.0 eager, float32, cpu".
    """

    median_ms: float
    spread_ms: float
    runs: int
    batch: int
    threads: int
    how: str


class EpochRecord(Record):
    """One epoch of training: mean of each loss term over the epoch's samples, learning rate at its end, seconds."""

    epoch: int
    terms: dict[str, float]
    learning_rate: float
    seconds: float


class StageRecord(Record):
    """The model after a stage.

    Attributes:
        index: 0 is the baseline, then the plan's stages from 1.
        kind: "baseline" or the stage's kind.
        name: e.g. "01-prune", the folder's name.
        metric: value on the test data, 0..1 for accuracy.
        metric_before_training: right after the stage's change, before its training, where it has both.
        parameters: entries of parameters, running statistics not counted.
        macs: multiply-accumulates of one sample.
        size_bytes: of the saved weight file.
        latency: of one forward pass.
        seconds: the stage took, resumed parts included.
        input_digest: digest of the weights that the stage started from.
        weights_digest: digest of the weights that it ended with.
        decision_digest: digest of what it decided, None for training alone.
        epochs: its training.
        notes: what a reader must know, e.g. layers that were left alone.
        sensitivity: the curves that the stage's ratios came from.
        zeros: masked weight -> zeros and entries, for a stage that masks.
    """

    index: int
    kind: Literal["baseline", "prune", "sparsify", "distill", "quantize", "finetune"]
    name: str
    metric: float
    metric_before_training: float | None = None
    parameters: int
    macs: int
    size_bytes: int
    latency: LatencyRecord
    seconds: float
    input_digest: str
    weights_digest: str = ""
    decision_digest: str | None = None
    epochs: tuple[EpochRecord, ...] = ()
    notes: tuple[str, ...] = ()
    sensitivity: Sensitivity | None = None
    zeros: dict[str, tuple[int, int]] = {}


class RunReport(Record):
    """One run on one backend.

    Attributes:
        plan: the plan's name.
        backend: its name.
        versions: distribution -> version.
        machine: processor, cores, operating system, Python.
        device: "cpu" or "gpu".
        metric_name: e.g. "accuracy".
        metric_is_share: is the metric 0..1, to be shown as per cent?
        stages: the baseline and each stage, in order.
        deployment: exported forms and their times, once they were measured.
    """

    plan: str
    backend: str
    versions: dict[str, str]
    machine: str
    device: str
    metric_name: str
    metric_is_share: bool = True
    stages: tuple[StageRecord, ...]
    deployment: Deployment | None = None

    def __str__(self) -> str:
        """The table that a terminal shows."""
        from slimbridge.report.table import render_run

        return render_run(self)


class Verdict(Record):
    """One claim of the parity of two runs.

    Attributes:
        stage: folder name of the stage.
        parity: "exact" (decisions, integers, MACs), "numeric" (one forward pass) or "behavioural" (the metric).
        claim: what was compared, in words.
        figure: the measured difference (share of differing entries, relative difference, points of accuracy).
        tolerance: the largest figure that passes.
        unit: of figure and tolerance.
        passed: None when it could not be compared.
        reason: why the tolerance is what it is, or why it could not be compared.
    """

    stage: str
    parity: Literal["exact", "numeric", "behavioural"]
    claim: str
    figure: float | None
    tolerance: float
    unit: str
    passed: bool | None
    reason: str


class Comparison(Record):
    """Several runs of one plan, and the verdicts of each later run against the first."""

    runs: tuple[RunReport, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Did no verdict fail, and was at least one claim compared?"""
        compared = [verdict.passed for verdict in self.verdicts if verdict.passed is not None]
        return bool(compared) and all(compared)

    def __str__(self) -> str:
        """The tables that a terminal shows."""
        from slimbridge.report.table import render_comparison

        return render_comparison(self)


def read_report(path: Path) -> RunReport:
    """Read a run's report.json; RunError when it is missing, truncated or something else."""
    try:
        return RunReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise RunError(f"{path}: not a run's report: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
