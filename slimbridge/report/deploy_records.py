"""What is told of exported files: how true they are, how large, and how fast in which runtime."""

from __future__ import annotations

from math import inf
from typing import Literal

from slimbridge.report.record import Record

Which = Literal["baseline", "compressed"]


class Exported(Record):
    """One exported form of a run's model, read back and compared.

    Attributes:
        form: "onnx", or a form of the framework's own, e.g. "paddle_int8".
        of: the run's baseline, in float, or its last stage.
        folder: where it is, relative to the run's folder.
        size_bytes: of all its files.
        integer: does it hold integer weights?
        difference: relative L2 difference of its outputs from the model's own, on the compared samples.
        agreement: share of the samples whose largest output is the same one; None where that says nothing.
        samples: how many were compared.
        compared_in: the runtime that ran it for that.
        notes: what a reader must know.
    """

    form: str
    of: Which
    folder: str
    size_bytes: int
    integer: bool
    difference: float
    agreement: float | None
    samples: int
    compared_in: str
    notes: tuple[str, ...] = ()


class Timed(Record):
    """One form in one runtime, timed in turns with the others.

    Attributes:
        form, of, size_bytes, integer: see `Exported`; form "eager" is the framework itself.
        runtime: name and version.
        median_ms, spread_ms: median and interquartile range of one pass, milliseconds.
        difference, agreement: of this runtime's outputs, checked before it was timed; see `Exported`.
        fused: layer kind -> (computed in integers, all), where the runtime tells.
    """

    form: str
    of: Which
    size_bytes: int | None
    integer: bool
    runtime: str
    median_ms: float
    spread_ms: float
    difference: float
    agreement: float | None
    fused: dict[str, tuple[int, int]] = {}


class Deployment(Record):
    """All that was measured of a run's exported forms in one series.

    Attributes:
        machine: processor, cores, operating system, Python.
        processor: its name.
        threads: of each runtime.
        rounds: passes of each, in turns.
        batch: samples a pass.
        exports: the forms.
        timed: each form in each runtime.
        failed: what could not be exported, run or trusted, and why.
    """

    machine: str
    processor: str
    threads: int
    rounds: int
    batch: int
    exports: tuple[Exported, ...]
    timed: tuple[Timed, ...]
    failed: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The table that a terminal shows."""
        from slimbridge.report.deploy_table import render_deployment

        return render_deployment(self)

    def eager(self) -> Timed | None:
        """The baseline in the framework itself, in float."""
        return next((row for row in self.timed if row.form == "eager" and row.of == "baseline"), None)

    def float_base(self, row: Timed) -> Timed | None:
        """The baseline in float in the same runtime as a row; None where it was not timed."""
        return next(
            (
                other
                for other in self.timed
                if other.of == "baseline" and not other.integer and other.runtime == row.runtime
            ),
            None,
        )

    def against_float(self, row: Timed) -> float | None:
        """Time over that of the baseline in float in the same runtime; None where that says nothing."""
        return _over(row, self.float_base(row))

    def against_eager(self, row: Timed) -> float | None:
        """Time over that of the framework's eager baseline in float; None where that says nothing."""
        return _over(row, self.eager())

    def slower(self) -> tuple[Timed, ...]:
        """Integer forms that are slower than the float baseline in their runtime, or than eager where it has none."""
        return tuple(row for row in self.timed if row.integer and (_over(row, self.reference(row)) or 0) > 1)

    def reference(self, row: Timed) -> Timed | None:
        """What a form should beat: the float baseline in its runtime, else the eager one."""
        return self.float_base(row) or self.eager()

    def best(self) -> Timed | None:
        """The fastest form of the compressed model, one in integers where there is any; None when none was timed."""
        there = [row for row in self.timed if row.of == "compressed" and 0 < row.median_ms < inf]
        return min(there, key=lambda row: (not row.integer, row.median_ms), default=None)


def _over(row: Timed, base: Timed | None) -> float | None:
    if base is None or not base.median_ms > 0:
        return None
    found = row.median_ms / base.median_ms
    return found if 0 < found < inf else None
