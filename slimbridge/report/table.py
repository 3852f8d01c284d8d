"""The tables that a terminal shows, and the words and units that every report uses."""

from __future__ import annotations

import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from math import isfinite

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from slimbridge.errors import RunError
from slimbridge.report.records import Comparison, LatencyRecord, RunReport, StageRecord, Verdict

LATENCY_RULE = (
    "Latency ratios are to the same backend's baseline; times of different frameworks' eager modes are not comparable."
)
_WIDE = 100
_NARROWEST = 60
_LONG_NAME = 16
_STYLES = {"equal": "green", "within": "green", "differs": "bold red", "not compared": "yellow"}


def plain(text: str) -> str:
    """One line of text without control characters, so that a report's strings cannot steer a terminal."""
    return "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    """Three significant digits and the unit; whole numbers in the first unit."""
    if value < base:
        return f"{value:.0f} {units[0]}".rstrip()
    index = 0
    while value >= base - 0.5 and index + 1 < len(units):
        value, index = value / base, index + 1
    places = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{places}f} {units[index]}"


def count(value: int) -> str:
    """Parameters or MACs, e.g. "57.3 k"."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T"))


def size(value: int) -> str:
    """Bytes in binary units, e.g. "226 KiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def percent(share: float) -> str:
    """A share of 0..1 as percent without the sign, e.g. "99.33"."""
    return f"{100 * share:.2f}"


def milliseconds(value: float) -> str:
    """Milliseconds to three digits, without the unit."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours with one decimal, e.g. "12.3 s"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5997 else f"{seconds / 3600:.1f} h"


def figure(value: float | None) -> str:
    """A difference or tolerance to three digits; "-" when there is none."""
    return "-" if value is None else f"{value:.3g}"


def ratio(value: float, base: float) -> float | None:
    """Value / base; None where that says nothing (base 0, or not finite)."""
    return value / base if base > 0 and isfinite(value / base) else None


def times(value: float | None) -> str:
    """A ratio as a factor, e.g. "0.49x"; empty when there is none."""
    return "" if value is None else f"{value:.2f}x" if value >= 0.095 else f"{value:.2g}x"


def simulated(stage: StageRecord) -> bool:
    """Was the stage's number format only simulated, so that its latency says nothing about a deployed model?"""
    return "simulated" in stage.latency.how


def baseline(run: RunReport) -> StageRecord | None:
    """The stage that ratios of the run refer to."""
    return next((stage for stage in run.stages if stage.kind == "baseline"), None)


def latency_ratio(stage: StageRecord, base: StageRecord | None) -> float | None:
    """Median latency over the baseline's; None for a simulated stage or without a baseline."""
    if base is None or simulated(stage) or simulated(base):
        return None
    return ratio(stage.latency.median_ms, base.latency.median_ms)


def labels(runs: Sequence[RunReport]) -> tuple[str, ...]:
    """One distinct word for each run: its backend, numbered where a backend is there more than once."""
    total = Counter(run.backend for run in runs)
    seen: Counter[str] = Counter()
    found = []
    for run in runs:
        seen[run.backend] += 1
        name = plain(run.backend)
        found.append(f"{name} #{seen[run.backend]}" if total[run.backend] > 1 else name)
    return tuple(found)


@dataclass(frozen=True)
class StageRow:
    """A stage in human units; the `_ratio` texts are to the run's baseline and empty for the baseline itself."""

    name: str
    metric: str
    before: str
    parameters: str
    parameters_ratio: str
    macs: str
    macs_ratio: str
    size: str
    size_ratio: str
    latency: str
    spread: str
    latency_ratio: str
    seconds: str


def stage_rows(run: RunReport) -> tuple[StageRow, ...]:
    """The stages of a run as texts, in order."""
    base = baseline(run)
    return tuple(_stage_row(stage, base) for stage in run.stages)


def _stage_row(stage: StageRecord, base: StageRecord | None) -> StageRow:
    other = None if stage is base else base

    def share(value: float, of: float | None) -> str:
        return "" if of is None else times(ratio(value, of))

    return StageRow(
        name=plain(stage.name),
        metric=percent(stage.metric),
        before="" if stage.metric_before_training is None else percent(stage.metric_before_training),
        parameters=count(stage.parameters),
        parameters_ratio=share(stage.parameters, other.parameters if other else None),
        macs=count(stage.macs),
        macs_ratio=share(stage.macs, other.macs if other else None),
        size=size(stage.size_bytes),
        size_ratio=share(stage.size_bytes, other.size_bytes if other else None),
        latency=milliseconds(stage.latency.median_ms),
        spread=f"{stage.latency.spread_ms:.2g}",
        latency_ratio="simulated" if simulated(stage) else times(latency_ratio(stage, other)),
        seconds=duration(stage.seconds),
    )


def latency_lines(runs: Sequence[RunReport]) -> tuple[str, ...]:
    """How latency was measured: one line for each backend and, where it changed between stages, for each way."""
    lines = []
    for label, run in zip(labels(runs), runs, strict=True):
        ways: dict[str, list[str]] = {}
        for stage in run.stages:
            ways.setdefault(_measured(stage.latency), []).append(plain(stage.name))
        several = len(ways) > 1
        lines += [f"{label}{', ' + ', '.join(names) if several else ''}: {way}" for way, names in ways.items()]
    return tuple(lines)


def _measured(latency: LatencyRecord) -> str:
    threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
    return f"{plain(latency.how)}; batch {latency.batch}, {threads}, median of {latency.runs}"


def note_lines(runs: Sequence[RunReport]) -> tuple[str, ...]:
    """Each different note once, after the stages and (with several runs) the backends that it belongs to."""
    found: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
    for label, run in zip(labels(runs), runs, strict=True):
        for stage in run.stages:
            for note in stage.notes:
                stages, backends = found.setdefault(plain(note), ({}, {}))
                stages[plain(stage.name)] = None
                backends[label] = None
    lines = []
    for note, (stages, backends) in found.items():
        where = f" ({', '.join(backends)})" if len(runs) > 1 else ""
        lines.append(f"{', '.join(stages)}{where}: {note}")
    return tuple(lines)


def verdict_word(verdict: Verdict) -> str:
    """The verdict as a word: "equal", "within" (the tolerance), "differs" or "not compared"."""
    if verdict.passed is None:
        return "not compared"
    if not verdict.passed:
        return "differs"
    return "equal" if verdict.figure == 0 or (verdict.figure is None and verdict.parity == "exact") else "within"


def parity_sentence(verdicts: Iterable[Verdict]) -> str:
    """The verdicts in one sentence, e.g. "2 of 12 claims differ: 8 equal, 2 within tolerance, 3 not compared"."""
    words = Counter(verdict_word(verdict) for verdict in verdicts)
    compared = words.total() - words["not compared"]
    if not compared:
        return f"Nothing was compared ({words.total()} claims could not be)" if words else "Nothing was compared"
    claims = "claim" if compared == 1 else "claims"
    if words["differs"]:
        head = f"{words['differs']} of {compared} {claims} {'differs' if words['differs'] == 1 else 'differ'}"
    elif words["equal"] == compared and not words["not compared"]:
        return f"All {compared} {claims} equal" if compared > 1 else "The one claim is equal"
    else:
        head = f"{compared} of {compared} {claims} {'holds' if compared == 1 else 'hold'}"
    texts = {"equal": "equal", "within": "within tolerance", "not compared": "not compared"}
    rest = ", ".join(f"{words[word]} {text}" for word, text in texts.items() if words[word])
    return f"{head}: {rest}" if rest else head


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
    if comparison.verdicts:
        _print_parity(console, comparison)


def _runs_table(runs: Sequence[RunReport], wide: bool) -> Table:
    has_before = any(stage.metric_before_training is not None for run in runs for stage in run.stages)
    metric = plain(runs[0].metric_name)
    gap = " " if wide else "\n"
    before = f"{gap}(before{gap}training)" if has_before else ""
    longest = max((len(stage.name) for run in runs for stage in run.stages), default=0)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("stage", overflow="fold", no_wrap=longest <= _LONG_NAME)
    headers = (f"{metric} %{before}", "params", "MACs", "size", f"latency{gap}ms", f"of own{gap}baseline", "time")
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
