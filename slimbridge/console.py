"""What the commands do and print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from slimbridge.errors import SlimbridgeError
from slimbridge.plan import Plan
from slimbridge.ports import Device


class Bars:
    """Progress as one bar on a terminal; on anything else only the lines that stay."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def start(self, text: str, total: int) -> None:
        """A new bar in place of the old one."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=total or None, note="")

    def step(self, note: str = "") -> None:
        """One step further."""
        if self._task is not None:
            self._bar.update(self._task, advance=1, note=note)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars on stderr, so that stdout holds results only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns, TextColumn("{task.fields[note]}"), console=console, transient=True, disable=not console.is_terminal
    )
    with bar:
        yield Bars(bar)


def run_one(plan: Plan, backend: str | None, folder: Path, resume: bool, as_json: bool) -> None:
    """Run a plan on one backend, save, and print its report."""
    import os

    from slimbridge.report.table import print_run
    from slimbridge.runner import compress

    with bars() as shown:
        result = compress(None, plan, backend=backend, run_dir=folder, resume=resume, progress=shown)
    result.save(folder)
    if os.environ.get("SLIMBRIDGE_CHILD"):
        return
    if as_json:
        _emit(result.report.model_dump(mode="json"))
        return
    print_run(Console(), result.report)
    _where(folder)


def run_many(plan: Plan, backends: list[str], folder: Path, resume: bool, as_json: bool) -> bool:
    """Run on several backends, compare, print; True when nothing differs."""
    from slimbridge.multirun import run_several
    from slimbridge.report.table import print_comparison

    comparison = run_several(plan, backends, folder, resume)
    if as_json:
        _emit(comparison.model_dump(mode="json"))
    else:
        print_comparison(Console(), comparison)
        _where(folder)
    return comparison.passed


def run_study(
    plan: Plan,
    vary: dict[str, list[Any]],
    backends: list[str],
    folder: Path,
    seeds: tuple[int, ...],
    resume: bool,
    as_json: bool,
) -> bool:
    """Run a study, print; True when no run failed."""
    from slimbridge import study as studies
    from slimbridge.report.study_table import print_study

    with bars() as shown:
        found = studies.run_study(
            plan, vary, backends=backends, output=folder, seeds=seeds, resume=resume, progress=shown
        )
    if as_json:
        _emit(found.model_dump(mode="json"))
    else:
        print_study(Console(), found)
        _where(folder)
    return not found.failed


def compare_two(reference: Path, other: Path, output: Path | None, as_json: bool) -> bool:
    """Compare two run folders, print; True when nothing differs."""
    from slimbridge.multirun import compare_folders
    from slimbridge.report.table import print_comparison

    comparison = compare_folders([reference, other], output)
    if as_json:
        _emit(comparison.model_dump(mode="json"))
    else:
        print_comparison(Console(), comparison)
        if output is not None:
            _where(output)
    return comparison.passed


def conformance(backend: str, device: Device, as_json: bool) -> bool:
    """Run the conformance suite, print; True when every case passes."""
    from slimbridge.conformance import run_conformance
    from slimbridge.discovery import get_backend

    console = Console(stderr=as_json)
    outcomes = []
    for outcome in run_conformance(get_backend(backend), device):
        outcomes.append(outcome)
        word = "[green]pass[/]" if outcome.passed else "[bold red]FAIL[/]"
        if not as_json:
            console.print(f"{word}  {outcome.case}", highlight=False)
            if not outcome.passed:
                console.print(f"      {outcome.message}", highlight=False, markup=False)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if as_json:
        _emit({"backend": backend, "passed": not failed, "cases": [vars(outcome) for outcome in outcomes]})
    else:
        console.print(f"{backend}: {len(outcomes) - len(failed)} of {len(outcomes)} cases pass", highlight=False)
    return not failed


def show_backends(as_json: bool) -> None:
    """Print what each registered backend can do here, or why it cannot be used."""
    from slimbridge.deploy.onnx_run import runtimes
    from slimbridge.discovery import backend_names, get_backend

    facts: dict[str, Any] = {}
    for name in backend_names():
        try:
            facts[name] = asdict(get_backend(name).capabilities())
        except SlimbridgeError as error:
            facts[name] = {"error": str(error)}
    if as_json:
        _emit(facts)
        return
    console = Console()
    for name, found in facts.items():
        console.print(f"[bold]{name}[/bold]")
        for key, value in found.items():
            items = [f"{k} {v}" for k, v in value.items()] if isinstance(value, dict) else value
            shown = ", ".join(items) if isinstance(items, (list, tuple)) else str(items)
            if key == "forms":
                shown = shown.replace("onnx_float", "onnx")
            if key != "backend":
                console.print(f"  {key.replace('_', ' ')}: {shown}", highlight=False, markup=False, soft_wrap=True)

    found = ", ".join(f"{name} {version}" for name, version in runtimes().items())
    console.print(f"ONNX files run in: {found or 'nothing that is installed'}", highlight=False, soft_wrap=True)


def inspect_model(name: str, backend: str, image_size: int | None, as_json: bool) -> None:
    """Print layers, groups and cost of a zoo model."""
    facts = model_facts(name, backend, image_size)
    if as_json:
        _emit(facts)
        return
    console = Console()
    table = Table("layer", "kind", "weight", "MACs", "group", "prunable", box=None, header_style="bold")
    for layer in facts["layers"]:
        shown = "yes" if layer["frozen"] is None else f"no: {layer['frozen']}"
        group = "" if layer["group"] is None else str(layer["group"])
        table.add_row(layer["path"], layer["kind"], str(tuple(layer["weight"])), f"{layer['macs']:,}", group, shown)
    console.print(table)
    console.print(
        f"{name} on {backend}, input {tuple(facts['input'])}: {facts['parameters']:,} parameters, "
        f"{facts['macs']:,} MACs, {facts['groups']} channel groups",
        highlight=False,
        soft_wrap=True,
    )


def model_facts(name: str, backend: str, image_size: int | None) -> dict[str, Any]:
    """The facts that `inspect` shows, as plain data."""
    import numpy as np

    from slimbridge import zoo
    from slimbridge.discovery import get_backend
    from slimbridge.graph import cost_of, find_units

    entry, side = zoo.entry(name), get_backend(backend)
    size = entry.image_size if image_size is None else image_size
    shape = (1, entry.in_channels, size, size)
    graph = side.trace(zoo.build(name, side), [np.zeros(shape, np.float32)])
    cost, units = cost_of(graph), find_units(graph)
    producers = {producer.weight: producer for producer in units.producers}
    groups = units.groups()
    group_of = {layer: index for index, group in enumerate(groups, start=1) for layer in group.layers}
    layers = []
    for node in graph.layer_nodes():
        producer = producers.get(node.params["weight"])
        layers.append(
            {
                "path": node.name,
                "kind": node.kind,
                "weight": list(graph.parameters[node.params["weight"]]),
                "macs": cost.by_layer.get(node.name, 0),
                "group": group_of.get(node.name),
                "frozen": units.why_frozen(producer) if producer else "its channels are those of its input",
            }
        )
    return {
        "model": name,
        "backend": backend,
        "input": list(shape),
        "parameters": cost.parameters,
        "macs": cost.macs,
        "groups": len(groups),
        "layers": layers,
        "unknown": list(graph.unknown_ops()),
    }


def export_run(folder: Path, forms: list[str], as_json: bool) -> None:
    """Export a run's model and print what came of each form."""
    from slimbridge.exports import export
    from slimbridge.report.figures import size

    with bars() as shown:
        done = export(folder, forms, progress=shown)
    if as_json:
        _emit([record.model_dump(mode="json") for record in done])
        return
    console = Console()
    for record in done:
        agreement = "" if record.agreement is None else f", largest output agrees in {record.agreement:.1%}"
        console.print(
            f"{record.form}: {folder / record.folder}, {size(record.size_bytes)}; outputs differ by "
            f"{record.difference:.2g} (relative) from the model's on {record.samples} samples{agreement} "
            f"({record.compared_in})",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        for note in record.notes:
            console.print(f"  {note}", highlight=False, markup=False, soft_wrap=True)


def bench_run(folder: Path, threads: int, rounds: int, as_json: bool) -> bool:
    """Measure a run's exports and print the table; True when a form of the compressed model was timed."""
    from slimbridge.deployment import bench
    from slimbridge.report.deploy_table import print_deployment

    with bars() as shown:
        found = bench(folder, threads=threads, rounds=rounds, progress=shown)
    if as_json:
        _emit(found.model_dump(mode="json"))
    else:
        print_deployment(Console(), found, folder.name)
        _where(folder)
    return found.best() is not None


def replay_run(reference: Path, backend: str, output: Path) -> None:
    """Replay a run on another backend."""
    from slimbridge.replay import replay

    with bars() as shown:
        replay(reference, backend, output, progress=shown)


def _emit(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


def _where(folder: Path) -> None:
    Console(stderr=True).print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
