"""A study as rows of texts, and as the table that a terminal shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from slimbridge.report.figures import count, milliseconds, percent, plain, ratio, size, times
from slimbridge.report.study_records import Figure, Line, Study, lines_of, seeds_of

SPREAD_RULE = "\u00b1 is the sample standard deviation (n - 1) over the seeds."
_WIDE = 90


@dataclass(frozen=True)
class LineRow:
    """A combination on one backend as texts: the model at its end; the ratios are to its own baseline."""

    combination: str
    backend: str
    seeds: str
    metric: str
    baseline: str
    macs: str
    macs_ratio: str
    parameters: str
    parameters_ratio: str
    size: str
    latency: str


def unit_of(study: Study) -> str:
    """A space and the sign of per cent for a share, else nothing."""
    return " %" if study.metric_is_share else ""


def metric_of(study: Study, value: Figure) -> str:
    """The metric's mean and spread, without its unit."""

    def shown(number: float) -> str:
        return percent(number) if study.metric_is_share else f"{number:.5g}"

    return shown(value.mean) + ("" if value.spread is None else f" \u00b1 {shown(value.spread)}")


def rows_of(study: Study) -> tuple[LineRow, ...]:
    """One row for each complete combination on each backend."""
    return tuple(_row(study, line) for line in lines_of(study) if line.points)


def _row(study: Study, line: Line) -> LineRow:
    first, last = line.points[0], line.points[-1]

    def of_whole(value: Figure, unit: Callable[[int], str]) -> str:
        return unit(round(value.mean))

    return LineRow(
        combination=plain(line.combination),
        backend=plain(line.backend),
        seeds=str(last.metric.seeds),
        metric=metric_of(study, last.metric),
        baseline=metric_of(study, first.metric),
        macs=of_whole(last.macs, count),
        macs_ratio=times(ratio(last.macs.mean, first.macs.mean)),
        parameters=of_whole(last.parameters, count),
        parameters_ratio=times(ratio(last.parameters.mean, first.parameters.mean)),
        size=of_whole(last.size_bytes, size),
        latency=milliseconds(last.latency_ms.mean),
    )


def failures_of(study: Study) -> tuple[str, ...]:
    """One line for each run that failed: which, and why."""
    return tuple(plain(f"{run.folder}: {run.error}") for run in study.failed)


def headline(study: Study) -> str:
    """How many runs, of what, how many of them failed."""
    names = len({run.combination for run in study.runs})
    parts = [f"{names} combination{'s' if names != 1 else ''}"]
    parts.append(" and ".join(dict.fromkeys(plain(run.backend) for run in study.runs)) or "no backend")
    seeds = seeds_of(study)
    if len(seeds) > 1:
        parts.append(f"seeds {', '.join(map(str, seeds))}")
    failed = len(study.failed)
    tail = f"; {failed} of {len(study.runs)} runs failed" if failed else ""
    return f"{', '.join(parts)}{tail}"


def render_study(study: Study, width: int | None = None) -> str:
    """The table as text; `width` in columns is the terminal's by default."""
    console = Console(file=StringIO(), width=max(60, width or shutil.get_terminal_size().columns), color_system=None)
    with console.capture() as capture:
        print_study(console, study)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n"


def print_study(console: Console, study: Study) -> None:
    """Print the table, and why runs failed."""
    console.print(Text.assemble("study of ", (plain(study.plan), "bold"), f": {headline(study)}"))
    wide = console.width >= _WIDE
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("combination", overflow="fold")
    table.add_column("backend", overflow="fold")
    metric = f"{plain(study.metric_name)}{unit_of(study)}"
    for header in (metric, "before", "MACs", "params", *(("size", "latency ms") if wide else ())):
        table.add_column(header, justify="right", overflow="fold")
    rows = rows_of(study)
    for row in rows:
        cells = [row.combination, row.backend, row.metric, row.baseline, f"{row.macs} {row.macs_ratio}"]
        cells += [f"{row.parameters} {row.parameters_ratio}", *((row.size, row.latency) if wide else ())]
        table.add_row(*map(Text, cells))
    if rows:
        console.print(table)
    if len(seeds_of(study)) > 1:
        console.print(Padding(Text(SPREAD_RULE, style="dim"), (0, 0, 0, 1)))
    for line in failures_of(study):
        console.print(Padding(Text.assemble(("FAILED ", "bold red"), line), (0, 0, 0, 1)), soft_wrap=True)
