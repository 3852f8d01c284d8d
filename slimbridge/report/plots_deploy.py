"""The plot of a run's measured exports: times of each form, by runtime."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten, wrap
from typing import Any

from slimbridge.report.deploy_figures import form_name
from slimbridge.report.deploy_records import Deployment, Timed
from slimbridge.report.figures import labels, milliseconds, plain
from slimbridge.report.records import RunReport
from slimbridge.report.traces import Plot, finite, safe

PART = "deployed-"
"""Part of the page that holds the plot of a run, before the run's number."""
_GAP, _BASELINE_OPACITY = 0.6, 0.45


def deployment_plots(runs: Sequence[RunReport]) -> list[Plot]:
    """One plot for each run whose exports were measured."""
    return [
        _plot(series, label, run.deployment)
        for series, (label, run) in enumerate(zip(labels(runs), runs, strict=True))
        if run.deployment is not None and run.deployment.timed
    ]


def _plot(series: int, label: str, found: Deployment) -> Plot:
    groups: dict[str, list[Timed]] = {row.runtime: [] for row in found.timed}
    for row in sorted(found.timed, key=lambda row: row.of != "baseline"):
        groups[row.runtime].append(row)
    places: list[float] = []
    centres, start = [], 0.0
    for rows in groups.values():
        places += [start + index for index in range(len(rows))]
        centres.append(start + (len(rows) - 1) / 2)
        start += len(rows) + _GAP
    ordered = [row for rows in groups.values() for row in rows]
    times = [_length(row) for row in ordered]
    layout = {
        "height": round(40 + 26 * start),
        "barmode": "overlay",
        "xaxis": {"range": [0, 1.6 * (max(times) or 1.0)], "showticklabels": False, "showgrid": False, "ticks": ""},
        "yaxis": {
            "tickvals": centres,
            "ticktext": [_tick(name) for name in groups],
            "range": [start - _GAP - 0.4, -0.6],
            "showgrid": False,
        },
    }
    caption = "Shorter is better. Pale: the float baseline. Full: the compressed model."
    return Plot(
        "Time of one pass, ms", caption, (_bars(series, label, ordered, places),), layout, True, f"{PART}{series}"
    )


def _length(row: Timed) -> float:
    """A bar has to have one, also where the time is none, and the axis ends beyond it."""
    return min(max(finite(row.median_ms) or 0.0, 0.0), 1e300)


def _tick(runtime: str) -> str:
    """On up to two lines, so that the bars keep their room on a phone."""
    lines = wrap(shorten(plain(runtime), 44, placeholder=" ..."), 22, max_lines=2, placeholder=" ...")
    return "<br>".join(safe(line) for line in lines)


def _bars(series: int, label: str, rows: Sequence[Timed], places: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "x": [_length(row) for row in rows],
        "y": list(places),
        "width": 0.8,
        "text": [
            safe(f"{milliseconds(row.median_ms)}  {shorten(form_name(row), 24, placeholder='...')}") for row in rows
        ],
        "textposition": "outside",
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [safe(_hover(label, row)) for row in rows],
        "marker": {"opacity": [_BASELINE_OPACITY if row.of == "baseline" else 1.0 for row in rows]},
        "meta": {"series": series},
    }


def _hover(label: str, row: Timed) -> str:
    spread = milliseconds(row.spread_ms)
    return f"{label}, {row.form} of the {row.of} model, {row.runtime}: {milliseconds(row.median_ms)} ms, IQR {spread}"
