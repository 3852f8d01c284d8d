"""The table of a run's measured exports that a terminal shows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from slimbridge.report.deploy_figures import Deployed, DeployRow, deployed
from slimbridge.report.deploy_records import Deployment

_WIDE, _WIDEST = 100, 120


def print_deployment(console: Console, deployment: Deployment, label: str) -> None:
    """Print what was measured of a run's exports: what is slower than float first, then the best form, then all.

    Args:
        console: where to.
        deployment: the figures.
        label: a word for the run.
    """
    shown = deployed(deployment, label)
    for warned in shown.warnings:
        console.print(Text(f"{shown.label}: {warned.text}", style="bold red" if warned.certain else "bold yellow"))
    console.print(Text(f"{shown.label}: {shown.headline}", style="bold"))
    if shown.rows:
        console.print(_table(shown.rows, console.width))
    for line in shown.failed:
        console.print(Padding(Text(f"not available: {line}", style="yellow"), (0, 0, 0, 1)))
    for line in (*_layer_lines(shown, console.width), *shown.notes, *shown.how):
        console.print(Padding(Text(line, style="dim"), (0, 0, 0, 1)))


def render_deployment(deployment: Deployment) -> str:
    """The same as text, as wide as the terminal."""
    console = Console(file=StringIO(), width=shutil.get_terminal_size().columns, no_color=True)
    print_deployment(console, deployment, "this run")
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"  # type: ignore[attr-defined]


def _table(rows: Sequence[DeployRow], width: int) -> Table:
    """Each row on one line where there is room, else on two."""
    wide = width >= _WIDE
    headers = ("ms (spread)", "of float,\nsame runtime", "of eager\nfloat", "size", "agreement")
    if not wide:
        headers = ("ms\n(IQR)", "of\nfloat", "of\neager", "size", "agree-\nment")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("runtime", overflow="fold", max_width=28 if wide else 18)
    table.add_column("form" if wide else "form\nof", overflow="fold", max_width=24)
    if wide:
        table.add_column("of", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    if width >= _WIDEST:
        table.add_column("layers in integers", overflow="fold")
    for number, row in enumerate(rows):
        if number and row.runtime:
            table.add_section()
        table.add_row(*_cells(row, width))
    return table


def _cells(row: DeployRow, width: int) -> list[Text]:
    wide = width >= _WIDE
    style = "bold red" if row.slower else ""
    names = [row.form, row.of] if wide else [f"{row.form}\n{row.of}"]
    latency = f"{row.latency}{' ' if wide else chr(10)}({row.spread})"
    agreement = row.agreement or row.difference
    size, agreement = (text if wide else text.replace(" ", "\n") for text in (row.size, agreement))
    last = [row.layers] if width >= _WIDEST else []
    return [
        Text(row.runtime, style="bold"),
        *map(Text, names),
        Text(latency, style=style),
        Text(row.of_float, style=style),
        *map(Text, [row.of_eager, size, agreement, *last]),
    ]


def _layer_lines(shown: Deployed, width: int) -> list[str]:
    """What the table has no room for."""
    if width >= _WIDEST:
        return []
    runtime, lines = "", []
    for row in shown.rows:
        runtime = row.runtime or runtime
        if row.layers:
            lines.append(f"Layers in integers, {row.form} in {runtime}: {row.layers}")
    return lines
