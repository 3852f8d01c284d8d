"""One HTML file that holds a whole comparison: it needs no network, and reads well in light, in dark and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slimbridge.errors import RunError
from slimbridge.files import write_file
from slimbridge.report.deploy_figures import all_deployed, deployed_latency
from slimbridge.report.figures import (
    LATENCY_RULE,
    StageRow,
    arrow,
    baseline,
    factor,
    labels,
    latency_lines,
    metric_scale,
    metric_text,
    metric_unit,
    milliseconds,
    note_lines,
    parity_sentence,
    plain,
    simulated,
    size,
    stage_rows,
    verdict_word,
)
from slimbridge.report.figures import count as human_count
from slimbridge.report.page import render_page
from slimbridge.report.plots import plots_of
from slimbridge.report.plots_deploy import deployment_plots
from slimbridge.report.plots_pruning import sensitivity_tables
from slimbridge.report.records import Comparison, RunReport, StageRecord


@dataclass(frozen=True)
class KeyFigure:
    """One large figure of a backend's card: what it is, the change, and the values before and after."""

    name: str
    change: str
    detail: str


@dataclass(frozen=True)
class Card:
    """What the page says of one run: its label, number, key figures and rows of the table of stages."""

    label: str
    series: int
    figures: tuple[KeyFigure, ...]
    rows: tuple[StageRow, ...]
    run: RunReport


def write_html(path: Path, comparison: Comparison) -> None:
    """Write the page; the file is there whole or not at all.

    Args:
        path: the file, replaced if it exists; its folder must exist.
        comparison: one run without verdicts, or several with them.

    Raises:
        RunError: there is no run, or the file cannot be written.
    """
    write_file(path, render_html(comparison))


def render_html(comparison: Comparison) -> str:
    """The page as text, about 5 MB since it holds the plotting library; RunError when there is no run."""
    runs = comparison.runs
    if not runs:
        raise RunError("a report needs at least one run, found none")
    return render_page(
        "report.html.j2",
        [*plots_of(runs), *deployment_plots(runs)],
        plan=plain(runs[0].plan),
        metric=plain(runs[0].metric_name),
        metric_unit=metric_unit(runs[0]),
        tone=_tone(comparison),
        headline=_headline(comparison),
        cards=_cards(runs),
        sensitivities=sensitivity_tables(runs),
        verdicts=[(verdict, verdict_word(verdict)) for verdict in comparison.verdicts],
        has_before=any(stage.metric_before_training is not None for run in runs for stage in run.stages),
        latency_lines=latency_lines(runs),
        latency_rule=LATENCY_RULE,
        notes=note_lines(runs),
        deployed=all_deployed(runs),
    )


def _tone(comparison: Comparison) -> str:
    if not comparison.verdicts:
        return "alone"
    if any(verdict.passed is False for verdict in comparison.verdicts):
        return "bad"
    return "good" if comparison.passed else "open"


def _headline(comparison: Comparison) -> str:
    runs = comparison.runs
    if len(runs) == 1 and not comparison.verdicts:
        return f"One run on {labels(runs)[0]}; nothing to compare it with"
    return parity_sentence(comparison.verdicts)


def _cards(runs: Sequence[RunReport]) -> list[Card]:
    return [
        Card(label, series, _key_figures(run), stage_rows(run), run)
        for series, (label, run) in enumerate(zip(labels(runs), runs, strict=True))
    ]


def _key_figures(run: RunReport) -> tuple[KeyFigure, ...]:
    """Last stage against the baseline; nothing when there is no baseline or no stage after it."""
    base, last = baseline(run), run.stages[-1] if run.stages else None
    if base is None or last is None or last is base:
        return ()
    points = metric_scale(run) * (last.metric - base.metric)
    sign = "+" if points > 0 else "\u2212" if points < 0 else ""
    change = f"{sign}{abs(points):.2f} points" if run.metric_is_share else f"{sign}{abs(points):.4g}"
    values = arrow(metric_text(run, base.metric), metric_text(run, last.metric) + metric_unit(run))
    return (
        KeyFigure(plain(run.metric_name), change, values),
        KeyFigure(
            "weight file",
            factor(base.size_bytes, last.size_bytes, "smaller", "larger"),
            arrow(size(base.size_bytes), size(last.size_bytes)),
        ),
        KeyFigure(
            "MACs",
            factor(base.macs, last.macs, "fewer", "more"),
            arrow(human_count(base.macs), human_count(last.macs)),
        ),
        _latency_figure(run, base, last),
    )


def _latency_figure(run: RunReport, base: StageRecord, last: StageRecord) -> KeyFigure:
    """Of the best exported integer form once it was measured, else of the last stage in the framework itself."""
    measured = deployed_latency(run.deployment) if run.deployment is not None else None
    if measured is not None:
        return KeyFigure("latency, deployed", *measured)
    if simulated(last):
        return KeyFigure("latency", "simulated", "int8 is computed in float here")
    before, after = base.latency.median_ms, last.latency.median_ms
    detail = arrow(milliseconds(before), f"{milliseconds(after)} ms")
    return KeyFigure("latency", factor(before, after, "faster", "slower"), detail)
