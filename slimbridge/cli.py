"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Optional

import typer

from slimbridge import __version__
from slimbridge.errors import SlimbridgeError

app = typer.Typer(
    name="slimbridge",
    help="One compression plan - pruning, quantization, distillation - on PaddlePaddle and on PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PlanArgument = Annotated[str, typer.Argument(help="A shipped plan's name or a YAML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Device = Annotated[Optional[Literal["cpu", "gpu"]], typer.Option(help="In place of the plan's.")]  # noqa: UP045


def main() -> None:
    """Entry point: a SlimbridgeError becomes its lines on stderr and exit code 2."""
    signal.signal(signal.SIGINT, _interrupted)
    try:
        app()
    except SlimbridgeError as error:
        _fail(str(error))
    except BrokenPipeError:
        sys.stderr.close()


def _interrupted(number: int, frame: object) -> NoReturn:
    typer.echo("slimbridge: interrupted; what is complete is kept, --resume goes on", err=True)
    raise SystemExit(128 + number)


def _fail(text: str) -> NoReturn:
    for line in text.splitlines():
        typer.echo(f"slimbridge: {line}", err=True)
    raise SystemExit(2)


def _emit(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def run(
    plan: PlanArgument,
    backend: Annotated[list[str] | None, typer.Option(help="Give it twice to compare.")] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder; default runs/<plan>.")] = None,  # noqa: UP045
    device: Device = None,
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder, if there is one.")] = False,
    baseline: Annotated[Optional[Path], typer.Option(help="Start from this weight file, without training.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Run a plan on one backend, or on several and compare them."""
    from slimbridge import console
    from slimbridge.plan import BaselineSection, load_plan

    loaded = load_plan(plan)
    if device is not None:
        loaded = load_plan({**loaded.model_dump(), "device": device})
    if baseline is not None:
        loaded = loaded.model_copy(update={"baseline": BaselineSection(weights=str(baseline.resolve()))})
    folder = output or Path("runs") / loaded.name
    names = backend or []
    if len(set(names)) < len(names):
        raise SlimbridgeError(f"--backend: a backend is named twice: {', '.join(names)}")
    if len(names) > 1:
        passed = console.run_many(loaded, names, folder, resume, as_json)
        raise typer.Exit(0 if passed else 1)
    console.run_one(loaded, names[0] if names else None, folder, resume, as_json)


@app.command()
def check(
    plan: PlanArgument,
    backend: Annotated[Optional[str], typer.Option(help="Resolve layer names on this backend.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Check a plan without running it: every mistake at once. Exit code 1 when there is one."""
    from slimbridge.check import check as check_plan

    found = check_plan(plan, backend)
    if as_json:
        _emit({"plan": plan, "ok": not found, "findings": found})
    else:
        typer.echo("\n".join(found) if found else f"{plan}: no mistake found")
    raise typer.Exit(1 if found else 0)


@app.command()
def parity(
    reference: Annotated[Path, typer.Argument(help="A complete run's folder.")],
    other: Annotated[Path, typer.Argument(help="Another complete run's folder.")],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder for report.html.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Compare two runs of one plan. Exit code 1 when something that should be equal differs."""
    from slimbridge import console

    raise typer.Exit(0 if console.compare_two(reference, other, output, as_json) else 1)


@app.command()
def study(
    plan: PlanArgument,
    vary: Annotated[
        list[str] | None,
        typer.Option(help="PATH=VALUE,VALUE, e.g. stages[0].importance=l1_norm,fpgm; give it once for each path."),
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Give it once for each backend.")] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="Folder; default runs/<plan>-study.")] = None,  # noqa: UP045
    seeds: Annotated[Optional[str], typer.Option(help="Seeds, e.g. 0,1,2.")] = None,  # noqa: UP045
    device: Device = None,
    resume: Annotated[bool, typer.Option(help="Keep complete runs in the folder and go on with the others.")] = False,
    as_json: Json = False,
) -> None:
    """Run a plan many times with some of its values varied. Exit code 1 when a run failed."""
    from slimbridge import console
    from slimbridge.plan import load_plan
    from slimbridge.study.vary import parse_seeds, parse_vary

    loaded = load_plan(plan)
    if device is not None:
        loaded = load_plan({**loaded.model_dump(), "device": device})
    names = backend or ([loaded.backend] if loaded.backend else [])
    if not names:
        raise SlimbridgeError("--backend: name the backend, or several, each with an option of its own")
    folder = output or Path("runs") / f"{loaded.name}-study"
    done = console.run_study(loaded, parse_vary(vary or ()), names, folder, parse_seeds(seeds), resume, as_json)
    raise typer.Exit(0 if done else 1)


Run = Annotated[Path, typer.Argument(help="A complete run's folder.")]


@app.command()
def export(
    run: Run,
    form: Annotated[
        list[str] | None,
        typer.Option(help="onnx, or a form of the framework's own; give it once for each. All if none."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a run's compressed model as files that run without its framework's training code, each checked."""
    from slimbridge import console

    console.export_run(run, form or [], as_json)


@app.command()
def bench(
    run: Run,
    threads: Annotated[int, typer.Option(help="Threads of each runtime.", min=1, max=1024)] = 1,
    rounds: Annotated[int, typer.Option(help="Passes of each form, in turns.", min=1, max=100_000)] = 50,
    as_json: Json = False,
) -> None:
    """Time every exported form in every installed runtime; the run's report shows it. Exit code 1 when none ran."""
    import os

    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)  # read when a framework is imported
    from slimbridge import console

    raise typer.Exit(0 if console.bench_run(run, threads, rounds, as_json) else 1)


@app.command()
def conformance(
    backend: Annotated[str, typer.Option(help="The backend to test.")],
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run the conformance suite on a backend. Exit code 1 when a case fails."""
    from slimbridge import console

    raise typer.Exit(0 if console.conformance(backend, device or "cpu", as_json) else 1)


@app.command()
def backends(as_json: Json = False) -> None:
    """Show the backends: what is installed, devices, and the pruners of other toolkits."""
    from slimbridge import console

    console.show_backends(as_json)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A zoo model's name.")],
    backend: Annotated[str, typer.Option(help="Build it on this backend.")] = "torch",
    image_size: Annotated[Optional[int], typer.Option(help="Side of the image, pixels.", min=1, max=4096)] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Show a model's layers, channel groups, parameters and MACs."""
    from slimbridge import console

    console.inspect_model(model, backend, image_size, as_json)


@app.command(hidden=True)
def replay(
    reference: Path,
    backend: Annotated[str, typer.Option()],
    output: Annotated[Path, typer.Option("--output", "-o")],
) -> None:
    """Replay a run on another backend, for `parity`."""
    from slimbridge import console

    console.replay_run(reference, backend, output)
