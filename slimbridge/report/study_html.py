"""A study as one HTML file: the curves of the metric against MACs, and the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slimbridge.files import write_file
from slimbridge.report.figures import count, plain
from slimbridge.report.page import render_page
from slimbridge.report.study_records import Line, Point, Study, lines_of, seeds_of
from slimbridge.report.study_table import SPREAD_RULE, failures_of, headline, metric_of, rows_of, unit_of
from slimbridge.report.traces import DASHES, SYMBOLS, Plot, finite, line, safe, sentence, span

COLOURS = 6
"""Colours of a theme; later combinations take them again with other symbols."""


def write_study_html(path: Path, study: Study) -> None:
    """Write the page, whole or not at all; RunError when it cannot be written."""
    write_file(path, render_study_html(study))


def render_study_html(study: Study) -> str:
    """The page as text, about 5 MB since it holds the plotting library."""
    lines = [line for line in lines_of(study) if line.points]
    return render_page(
        "study.html.j2",
        [*_ends(study, lines), *_curves(study, lines)],
        plan=plain(study.plan),
        metric=plain(study.metric_name),
        metric_unit=unit_of(study),
        headline=headline(study),
        failures=failures_of(study),
        rows=rows_of(study),
        spread_rule=SPREAD_RULE if len(seeds_of(study)) > 1 else "",
        several_backends=len({line.backend for line in lines}) > 1,
    )


def _curves(study: Study, lines: Sequence[Line]) -> list[Plot]:
    """One line for each combination on each backend, its points the stages in their order."""
    shown = [found for found in lines if found.curve]
    if not shown:
        return []
    names, backends = _order(found.combination for found in shown), _order(found.backend for found in shown)
    traces = [
        _trace(
            study,
            (names.index(found.combination), backends.index(found.backend)),
            f"{found.combination}, {found.backend}",
            [(point, point.stage) for point in found.curve],
        )
        for found in shown
    ]
    caption = (
        "From right to left: the stages of a run, from its baseline on; masks and simulated integers leave the MACs "
        "as they are and are left out. The axes do not start at 0."
    )
    title = f"{sentence(study.metric_name)} against MACs, stage by stage"
    return [Plot(title, caption, tuple(traces), _layout(study, traces), wide=True)]


def _ends(study: Study, lines: Sequence[Line]) -> list[Plot]:
    """The ends of the runs, those that differ in numbers alone joined: what each amount of pruning costs."""
    families: dict[tuple[str, str], list[Line]] = {}
    for found in lines:
        if found.curve:
            families.setdefault((_family(found), found.backend), []).append(found)
    if all(len(members) < 2 for members in families.values()):
        return []
    names, backends = _order(name for name, _ in families), _order(backend for _, backend in families)
    traces = []
    for (family, backend), members in families.items():
        ends = [(member.curve[-1], member.combination) for member in members]
        starts = {(m.curve[0].macs, m.curve[0].metric): (m.curve[0], m.curve[0].stage) for m in members}
        if len(starts) == 1:  # one baseline for all of them
            ends += starts.values()
        ends.sort(key=lambda end: end[0].macs.mean)
        place = (names.index(family), backends.index(backend))
        traces.append(_trace(study, place, f"{family}, {backend}" if family else backend, ends))
    caption = (
        "Each point is the end of a run, and the baseline where all have the same one. Runs that differ only in "
        "numbers that were varied are joined."
    )
    title = f"{sentence(study.metric_name)} against MACs, end of each run"
    return [Plot(title, caption, tuple(traces), _layout(study, traces), wide=True)]


def _family(found: Line) -> str:
    """The varied values that are no numbers."""
    words = [v for v in found.values.values() if isinstance(v, (bool, str)) or not isinstance(v, (int, float))]
    return ", ".join(str(value) for value in words)


def _order(names: Iterable[str]) -> list[str]:
    """Each once, as they come."""
    return list(dict.fromkeys(names))


def _trace(study: Study, place: tuple[int, int], name: str, points: Sequence[tuple[Point, str]]) -> dict[str, Any]:
    """A line through points and what each is called; `place` is its colour and symbol, and its dash."""
    series, side = place
    scale = 100.0 if study.metric_is_share else 1.0
    hovers = [
        f"{plain(name)}, {plain(what)}: {metric_of(study, point.metric)}{unit_of(study)}"
        f"\n{count(round(point.macs.mean))} MACs, {count(round(point.parameters.mean))} parameters"
        for point, what in points
    ]
    macs = [point.macs.mean for point, _ in points]
    trace = line(series, macs, [finite(scale * point.metric.mean) for point, _ in points], hovers)
    # Equal lines of two backends must both be seen: broad and pale below, thin, dashed and open above.
    trace["line"] = {"width": 2 if side else 5, "dash": DASHES[side % len(DASHES)]}
    symbol = SYMBOLS[(series + series // COLOURS) % len(SYMBOLS)]
    trace["marker"] = {"size": 12 if side else 9, "symbol": f"{symbol}-open" if side else symbol}
    trace["opacity"] = 1 if side else 0.6
    if any(point.metric.spread is not None for point, _ in points):
        spreads = [scale * (point.metric.spread or 0.0) for point, _ in points]
        trace["error_y"] = {"type": "data", "array": spreads, "thickness": 1.2, "width": 4}
    return {**trace, "name": safe(name), "showlegend": True}


def _layout(study: Study, traces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reach = []
    for trace in traces:
        spreads = trace.get("error_y", {}).get("array", [0.0] * len(trace["y"]))
        reach += [y + way * e for y, e in zip(trace["y"], spreads, strict=True) if y is not None for way in (-1, 1)]
    unit = unit_of(study).strip()
    rows = -(-len(traces) // 3)
    return {
        "height": 380 + 22 * rows,
        "showlegend": True,
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        "xaxis": {"title": {"text": "MACs of one sample"}, "tickformat": "~s", "rangemode": "normal"},
        "yaxis": {"range": span(reach), **({"ticksuffix": f" {unit}"} if unit else {})},
    }
