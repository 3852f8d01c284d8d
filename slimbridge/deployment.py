"""Measures a run's exported forms in every runtime that is installed, in turns, results checked first."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slimbridge.deploy.onnx_run import fusion, runtimes
from slimbridge.deploy.trust import objection
from slimbridge.errors import FAILURES, RunError, SlimbridgeError, first_line
from slimbridge.exports import FLOAT, ONNX, ONNX_FLOAT, Exporter, Runner
from slimbridge.onerun import machine
from slimbridge.ports import Array, Model, tensors_in
from slimbridge.report.deploy_records import Deployment, Exported, Timed, Which
from slimbridge.report.html import write_html
from slimbridge.report.records import Comparison, read_report
from slimbridge.tasks import Data
from slimbridge.train import Progress, Quiet

ROUNDS, WARMUP = 50, 5


def bench(
    run_dir: str | Path,
    *,
    threads: int = 1,
    rounds: int = ROUNDS,
    model: Model | None = None,
    data: Data | tuple[Any, Any] | None = None,
    progress: Progress | None = None,
) -> Deployment:
    """Export every form anew, check it in every runtime, time them in turns, and show it all.

    The figures go into bench.json, report.json and report.html of the run's folder.

    Args:
        run_dir: of a complete run.
        threads: of each runtime; the framework's eager mode has those that it was started with.
        rounds: passes of each form, in turns.
        model: a fresh model of the run's framework, where the plan names none.
        data: as for `compress`, where the plan names none.
        progress: who is told.

    Raises:
        SlimbridgeError: it is no complete run, or nothing of it can be timed.
    """
    for word, number in (("threads", threads), ("rounds", rounds)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise RunError(f"{word} must be a whole number of 1 or more, found {number!r}")
    job = _Bench(Exporter(Path(run_dir), model, data), threads, rounds, progress or Quiet())
    job.exporter.model_of("compressed")  # a model that is missing or another's is no form's fault
    found = job.run()
    folder = job.exporter.folder
    folder.write_deployment(found)
    report = read_report(folder.path / "report.json").model_copy(update={"deployment": found})
    folder.write_report(report)
    write_html(folder.path / "report.html", Comparison(runs=(report,), verdicts=()))
    return found


@dataclass
class _Entry:
    """One form in one runtime: its row so far, and what runs it."""

    row: Timed
    run: Callable[[], Any]


class _Bench:
    def __init__(self, exporter: Exporter, threads: int, rounds: int, progress: Progress) -> None:
        self.exporter, self.threads, self.rounds, self.progress = exporter, threads, rounds, progress
        self.failed: list[str] = []
        self.exports: list[Exported] = []

    def run(self) -> Deployment:
        self._export_all()
        entries = list(self._entries())
        if not entries:
            raise RunError("; ".join(["nothing can be timed", *self.failed]))
        timed = self._time(entries)
        return Deployment(
            machine=machine(),
            processor=processor(),
            threads=self.threads,
            rounds=self.rounds,
            batch=int(self.exporter.samples[0][0].shape[0]),
            exports=tuple(self.exports),
            timed=timed,
            failed=tuple(self.failed),
        )

    def _export_all(self) -> None:
        exporter = self.exporter
        own = exporter.backend.capabilities().forms
        floats = [form for form in own if form.endswith(FLOAT) and form != ONNX_FLOAT]
        wanted: list[tuple[str, Which]] = [(form, "compressed") for form in exporter.forms()]
        wanted += [(form, "baseline") for form in ([ONNX] if ONNX_FLOAT in own else []) + floats]
        self.progress.start("exporting", len(wanted))
        for form, which in wanted:
            try:
                self.exports.append(exporter.export(form, which))
            except SlimbridgeError as error:
                self.failed.append(f"{form} of the {which} model: {' '.join(str(error).split())}")
            self.progress.step(form)

    def _entries(self) -> Iterator[_Entry]:
        yield self._eager()
        for export in self.exports:
            names = _onnx_runtimes() if export.form == ONNX else self._own_runtime(export.form)
            for name, label in names.items():
                found = self._checked(export, name, label)
                if found is not None:
                    yield found

    def _own_runtime(self, form: str) -> dict[str, str]:
        return {form: self.exporter.backend.capabilities().runtimes.get(form, form)}

    def _eager(self) -> _Entry:
        exporter, backend = self.exporter, self.exporter.backend
        model = exporter.model_of("baseline")
        inputs = [backend.tensor(model, array) for array in exporter.samples[0]]
        capabilities = backend.capabilities()
        if capabilities.threads != self.threads:
            self.failed.append(
                f"{backend.name} eager had {capabilities.threads} threads, the runtimes {self.threads}: "
                "the command `slimbridge bench` starts it with as many"
            )
        version = next(iter(capabilities.versions.values()), "")
        row = Timed(
            form="eager",
            of="baseline",
            size_bytes=None,
            integer=False,
            runtime=f"{backend.name} {version} eager",
            median_ms=0.0,
            spread_ms=0.0,
            difference=0.0,
            agreement=None,
        )
        return _Entry(row, lambda: backend.ops.numpy(tensors_in(backend.forward(model, inputs).output)[0]))

    def _checked(self, export: Exported, name: str, label: str) -> _Entry | None:
        """Run the samples first; None, and a line, when the runtime does not give the model's outputs."""
        exporter = self.exporter
        folder = exporter.path / export.folder
        try:
            run = exporter.runner(export.form, folder, name, self.threads)
            difference, agreement = exporter.compare(run, export.of)
        except (*FAILURES, SlimbridgeError) as error:
            self.failed.append(f"{export.form} of the {export.of} model in {label}: {first_line(error)}")
            return None
        wrong = objection(difference, agreement, "export_runtime")
        if wrong is not None:
            self.failed.append(f"{export.form} of the {export.of} model in {label}: not timed: {wrong}")
            return None
        fused = fusion(folder / "model.onnx").counts if name == "onnxruntime" and export.integer else {}
        row = Timed(
            form=export.form,
            of=export.of,
            size_bytes=export.size_bytes,
            integer=export.integer,
            runtime=label,
            median_ms=0.0,
            spread_ms=0.0,
            difference=difference,
            agreement=agreement,
            fused=fused,
        )
        return _Entry(row, partial(_call, run, exporter.samples[0]))

    def _time(self, entries: Sequence[_Entry]) -> tuple[Timed, ...]:
        """Passes in turns, so that what else the machine does falls on all alike."""
        seconds: list[list[float]] = [[] for _ in entries]
        self.progress.start("timing", WARMUP + self.rounds)
        for number in range(WARMUP + self.rounds):
            for entry, times in zip(entries, seconds, strict=True):
                started = time.perf_counter()
                entry.run()
                if number >= WARMUP:
                    times.append(time.perf_counter() - started)
            self.progress.step()
        return tuple(_timed(entry.row, times) for entry, times in zip(entries, seconds, strict=True))


def _onnx_runtimes() -> dict[str, str]:
    return {name: f"{name} {version}" for name, version in runtimes().items()}


def _call(run: Runner, inputs: Sequence[Array]) -> list[Array]:
    return run(inputs)


def _timed(row: Timed, seconds: Sequence[float]) -> Timed:
    low, median, high = np.percentile(np.array(seconds) * 1000, [25, 50, 75])
    return row.model_copy(update={"median_ms": round(float(median), 4), "spread_ms": round(float(high - low), 4)})


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
