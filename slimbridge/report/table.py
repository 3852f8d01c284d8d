"""The tables that a terminal shows."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from slimbridge.errors import RunError
from slimbridge.report.deploy_table import print_deployment
from slimbridge.report.figures import (
    LATENCY_RULE,
    LONG_NAME,
    StageRow,
    figure,
    labels,
    latency_lines,
    metric_unit,
    note_lines,
    parity_sentence,
    plain,
    stage_rows,
    verdict_word,
)
from slimbridge.report.records import Comparison, RunReport, Verdict

_WIDE = 100
_NARROWEST = 60
_STYLES = {"equal": "green", "within": "green", "differs": "bold red", "not compared": "yellow"}


def render_run(report: RunReport, width: int | None = None, colour: bool = False) -> str:
    """The table of one run as text, see `render_comparison`."""
    return render_comparison(Comparison(runs=(report,), verdicts=()), width, colour)


def render_comparison(comparison: Comparison, width: int | None = None, colour: bool = False) -> str:
    """The tables of several runs as text.

    Args:
        comparison: the runs and, where they were compared, the verdicts.
        width: columns, the terminal's by default; fewer than 60 count as 60.
        colour: with the terminal's colour codes.

    Raises:
        RunError: there is no run.
    """
    columns = max(_NARROWEST, width or shutil.get_terminal_size().columns)
    console = Console(
        file=StringIO(),
        width=columns,
        force_terminal=colour,
        color_system="standard" if colour else None,
        no_color=not colour,
        legacy_windows=False,
    )
    with console.capture() as capture:
        print_comparison(console, comparison)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n"


def print_run(console: Console, report: RunReport) -> None:
    """Print the table of one run."""
    print_comparison(console, Comparison(runs=(report,), verdicts=()))


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print the tables of several runs; RunError when there is none."""
    runs = comparison.runs
    if not runs:
        raise RunError("a report needs at least one run, found none")
    console.print(Text.assemble("plan ", (plain(runs[0].plan), "bold"), " on ", " and ".join(labels(runs))))
    console.print(_runs_table(runs, wide=console.width >= _WIDE))
    for line in (*latency_lines(runs), LATENCY_RULE, *note_lines(runs)):
        console.print(Padding(Text(line, style="dim"), (0, 0, 0, 1)))
    for label, run in zip(labels(runs), runs, strict=True):
        if run.deployment is not None:
            console.print()
            print_deployment(console, run.deployment, label)
    if comparison.verdicts:
        _print_parity(console, comparison)


def _runs_table(runs: Sequence[RunReport], wide: bool) -> Table:
    has_before = any(stage.metric_before_training is not None for run in runs for stage in run.stages)
    metric = plain(runs[0].metric_name)
    gap = " " if wide else "\n"
    before = f"{gap}(before{gap}training)" if has_before else ""
    longest = max((len(stage.name) for run in runs for stage in run.stages), default=0)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("stage", overflow="fold", no_wrap=longest <= LONG_NAME)
    headers = (
        f"{metric}{metric_unit(runs[0])}{before}",
        "params",
        "MACs",
        "size",
        f"latency{gap}ms",
        f"of own{gap}baseline",
        "time",
    )
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    for label, run in zip(labels(runs), runs, strict=True):
        table.add_row(Text(label, style="bold"))
        for row in stage_rows(run):
            table.add_row(*(Text(cell) for cell in _cells(row, wide)))
        if not run.stages:
            table.add_row(Text("no stage", style="dim"))
        table.add_section()
    return table


def _cells(row: StageRow, wide: bool) -> tuple[str, ...]:
    def scaled(value: str, factor: str) -> str:
        return f"{value} {factor:>5}" if wide else value.replace(" k", "k").replace(" M", "M").replace(" G", "G")

    return (
        row.name,
        f"{row.metric} ({row.before})" if row.before else row.metric,
        scaled(row.parameters, row.parameters_ratio),
        scaled(row.macs, row.macs_ratio),
        scaled(row.size, row.size_ratio),
        row.latency,
        row.latency_ratio,
        row.seconds,
    )


def _print_parity(console: Console, comparison: Comparison) -> None:
    bad = any(verdict.passed is False for verdict in comparison.verdicts)
    style = "bold green" if comparison.passed else "bold red" if bad else "bold yellow"
    console.print()
    console.print(Text(f"parity: {parity_sentence(comparison.verdicts)}", style=style))
    console.print(_parity_table(comparison.verdicts, wide=console.width >= _WIDE))
    for verdict in comparison.verdicts:
        if not verdict.passed:
            word = verdict_word(verdict)
            head = Text(_shown(word), style=_STYLES[word])
            body = f" {plain(verdict.stage)}, {plain(verdict.claim)}: {plain(verdict.reason)}"
            console.print(Padding(head + Text(body, style=""), (0, 0, 0, 1)))


def _parity_table(verdicts: Sequence[Verdict], wide: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("class", overflow="fold")
    table.add_column("claim", overflow="fold")
    table.add_column("figure", justify="right", overflow="fold")
    table.add_column("tolerance", justify="right", overflow="fold")
    if wide:
        table.add_column("unit", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    last = None
    for verdict in verdicts:
        if verdict.stage != last:
            table.add_row(Text(plain(verdict.stage), style="bold"))
            last = verdict.stage
        word = verdict_word(verdict)
        claim, unit = plain(verdict.claim), plain(verdict.unit)
        cells = [verdict.parity, claim if wide else f"{claim} ({unit})"]
        cells += [figure(verdict.figure), figure(verdict.tolerance), *([unit] if wide else [])]
        table.add_row(*map(Text, cells), Text(_shown(word), style=_STYLES[word]))
    return table


def _shown(word: str) -> str:
    """In a terminal without colour the one bad word must still stand out."""
    return "DIFFERS" if word == "differs" else word
