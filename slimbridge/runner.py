"""Runs a plan on one backend: `compress`, and `restore` for what a run left."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimbridge.discovery import backend_of, find_backend
from slimbridge.errors import RunError
from slimbridge.onerun import Given, Run, rebuild
from slimbridge.plan import Plan, load_plan
from slimbridge.ports import Model
from slimbridge.report.html import write_html
from slimbridge.report.records import Comparison, RunReport
from slimbridge.runfolder import RunFolder, stage_names
from slimbridge.stages import UserLoss
from slimbridge.tasks import Data
from slimbridge.tasks.metrics import Metric
from slimbridge.tasks.own import as_data
from slimbridge.train import Progress, Quiet


@dataclass(frozen=True)
class Result:
    """What `compress` returns.

    Attributes:
        model: the compressed model, a native model of its framework.
        report: accuracy, size, cost, latency after each stage; print it.
        folder: the run's folder.
    """

    model: Model
    report: RunReport
    folder: Path
    _keep: Any = field(default=None, repr=False)

    def save(self, path: str | Path, replace: bool = False) -> Path:
        """Copy the run's folder, and write its report as HTML too.

        Args:
            path: a new or empty folder.
            replace: an older run's folder may be there; it is replaced once the new one is complete.

        Raises:
            RunError: the target holds something else, or cannot be written; nothing there is lost.
        """
        target = Path(path)
        if target.resolve() != self.folder.resolve():
            self._copy(target, replace)
        write_html(target / "report.html", Comparison(runs=(self.report,), verdicts=()))
        return target

    def _copy(self, target: Path, replace: bool) -> None:
        old = target.exists() and (not target.is_dir() or any(target.iterdir()))
        if old and not (replace and (target / "run.json").is_file()):
            hint = "" if replace else ", or say replace=True for an older run"
            raise RunError(f"{target}: exists and is not empty; name another folder{hint}")
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            shutil.copytree(self.folder, part, ignore=shutil.ignore_patterns(".lock"))
            if target.exists():
                shutil.rmtree(target)
            part.replace(target)
        except (OSError, shutil.Error) as error:
            raise RunError(f"{target}: cannot be written: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def compress(
    model: Model | None,
    plan: str | Path | Mapping[str, Any] | Plan,
    *,
    data: Data | tuple[Any, Any] | None = None,
    loss: UserLoss | None = None,
    metric: Metric | None = None,
    backend: str | None = None,
    device: str | None = None,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Run a plan on a model.

    Args:
        model: a torch.nn.Module or paddle.nn.Layer, left as it is; None builds the plan's own.
        plan: a shipped plan's name, a path, a mapping or a `Plan`.
        data: `Data` or a pair (train, test); each part a `Split` or a re-iterable of (inputs, targets) batches of
            NumPy arrays or native tensors, a DataLoader for one. None takes the plan's.
        loss: (output, targets) -> native scalar, in place of the task's loss on labels.
        metric: (outputs, targets) as arrays -> number, in place of the task's metric.
        backend: its name, where no model is given; else found from the model's type.
        device: "cpu" or "gpu", in place of the plan's.
        run_dir: the run's folder, new or empty; None uses a temporary one, see `Result.save`.
        resume: go on with the run in `run_dir`, if there is one.
        progress: who is told; None is quiet.

    Raises:
        SlimbridgeError: any mistake in plan, data or model, in one or two lines.
    """
    plan = load_plan(plan)
    if device is not None:
        plan = load_plan({**plan.model_dump(), "device": device})
    for word, function in (("loss", loss), ("metric", metric)):
        if function is not None and not callable(function):
            raise RunError(f"{word} must be a function, found {type(function).__name__}")
    if progress is not None and not all(hasattr(progress, word) for word in ("start", "step", "say")):
        raise RunError(
            f"progress must have start, step and say, found {type(progress).__name__}: enter a context manager first"
        )
    side = find_backend(model, backend or plan.backend)
    given = Given(model, as_data(data), loss, metric)
    keep = None if run_dir is not None else tempfile.TemporaryDirectory(prefix="slimbridge-")
    path = Path(run_dir) if run_dir is not None else Path(str(keep and keep.name))
    run = Run.begin(side, plan, given, path, resume, progress or Quiet())
    final, report = run.run()
    return Result(final, report, path, keep)


def restore(model: Model, run_dir: str | Path) -> Model:
    """The compressed model from a fresh, uncompressed one and the run's folder.

    Args:
        model: of the run's architecture, on any framework, left as it is.
        run_dir: of a complete run.

    Raises:
        RunError, ModelError: it is no run folder, or the model does not fit it.
    """
    folder = RunFolder(Path(run_dir))
    folder.require_complete()
    side = backend_of(model)
    return rebuild(side, side.clone(model), folder, stage_names(folder.plan())[-1])


def compare_runs(
    reference: str | Path,
    other: str | Path,
    *,
    model: Model | None = None,
    data: Data | tuple[Any, Any] | None = None,
    output: str | Path | None = None,
) -> Comparison:
    """The parity of two complete runs of one plan; the reference is replayed on the other's framework.

    Args:
        reference, other: the runs' folders.
        model: a fresh, uncompressed model of the other's framework, where the plan names none.
        data: as for `compress`, where the plan names none.
        output: gets comparison.json and report.html.

    Raises:
        SlimbridgeError: a run is not complete, the plans differ, or the model is another one.
    """
    from slimbridge.multirun import compare_folders

    folder = Path(output) if output is not None else None
    return compare_folders([Path(reference), Path(other)], folder, model, as_data(data))


__all__ = ["Result", "compare_runs", "compress", "restore"]
