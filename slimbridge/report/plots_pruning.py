"""The plots of what only some stages have: sensitivity curves, and zeros by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slimbridge.curves import GroupCurve, Sensitivity
from slimbridge.errors import listed
from slimbridge.report.figures import count, labels, metric_scale, metric_text, metric_unit, percent, plain
from slimbridge.report.records import RunReport, StageRecord
from slimbridge.report.traces import PATTERNS, Plot, finite, line, safe, span, ticks

SENSITIVITY = "sensitivity"
"""Part of the page that holds the curves of the channel groups."""


def sparsity_plot(runs: Sequence[RunReport], name: str) -> list[Plot]:
    """Share of zeros in each weight that a stage masked; nothing when no run masked any in it."""
    found = [(series, label, stage) for series, label, stage in _stages(runs, name) if stage.zeros]
    if not found:
        return []
    weights = list(dict.fromkeys(weight for _, _, stage in found for weight in stage.zeros))
    bars = tuple(_sparsity_bars(series, label, stage, weights) for series, label, stage in found)
    layout = {
        "height": 70 + len(weights) * (10 + 16 * len(found)),
        "barmode": "group",
        "bargap": 0.3,
        "xaxis": {"range": [0, 118], "ticksuffix": " %", "dtick": 25},
        "yaxis": {**ticks([weight.removesuffix(".weight") for weight in weights]), "range": [len(weights) - 0.5, -0.5]},
    }
    caption = " ".join(f"{label}: {_all_zeros(stage)}." for _, label, stage in found)
    return [Plot(f"Zeros by layer, {plain(name)}", caption, bars, layout, wide=True)]


def _stages(runs: Sequence[RunReport], name: str) -> Iterator[tuple[int, str, StageRecord]]:
    """Series, label and stage of each run that has a stage of that name."""
    for series, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        yield from ((series, label, stage) for stage in run.stages if stage.name == name)


def _all_zeros(stage: StageRecord) -> str:
    zeros, entries = (sum(pair[part] for pair in stage.zeros.values()) for part in (0, 1))
    return f"{percent(zeros / max(1, entries))} % of {count(entries)} masked entries are zero"


def _sparsity_bars(series: int, label: str, stage: StageRecord, weights: Sequence[str]) -> dict[str, Any]:
    shares = {weight: 100 * zeros / max(1, entries) for weight, (zeros, entries) in stage.zeros.items()}
    there = [weight for weight in weights if weight in shares]
    return {
        "type": "bar",
        "orientation": "h",
        "x": [shares[weight] for weight in there],
        "y": [weights.index(weight) for weight in there],
        "text": [f"{shares[weight]:.1f} %" for weight in there],
        "textposition": "outside",
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [
            safe(f"{label}, {weight}: {stage.zeros[weight][0]:,} of {stage.zeros[weight][1]:,}") for weight in there
        ],
        "marker": {"pattern": {"shape": PATTERNS[series % len(PATTERNS)], "fillmode": "overlay", "size": 6}},
        "meta": {"series": series},
    }


def sensitivity_plots(runs: Sequence[RunReport], name: str) -> list[Plot]:
    """One small plot for each channel group, all to one scale; nothing when no run measured curves in the stage."""
    found = [
        (series, label, runs[series], stage.sensitivity)
        for series, label, stage in _stages(runs, name)
        if stage.sensitivity is not None
    ]
    drawn: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    channels: dict[tuple[str, ...], int] = {}
    for series, label, run, curves in found:
        for curve in curves.curves:
            drawn.setdefault(curve.layers, []).append(_curve(series, label, run, curves, curve))
            channels[curve.layers] = curve.channels
    values = [y for traces in drawn.values() for trace in traces for y in trace["y"]]
    layout = {"height": 170, "xaxis": {"ticksuffix": " %", "range": [-3, 100]}, "yaxis": {"range": span(values)}}
    return [
        Plot(
            plain(listed(layers, 2)),
            f"{plain(name)}, {channels[layers]} channels",
            tuple(traces),
            layout,
            False,
            SENSITIVITY,
        )
        for layers, traces in drawn.items()
    ]


def _curve(series: int, label: str, run: RunReport, found: Sensitivity, curve: GroupCurve) -> dict[str, Any]:
    """From the unpruned metric at 0 on."""
    points = sorted({0.0: found.metric, **curve.points}.items())
    hovers = [f"{label}, {100 * ratio:g} % removed: {metric_text(run, y)}{metric_unit(run)}" for ratio, y in points]
    trace = line(series, [100 * x for x, _ in points], [finite(metric_scale(run) * y) for _, y in points], hovers)
    return {**trace, "marker": {**trace["marker"], "size": 6}, "line": {**trace["line"], "width": 2}}


@dataclass(frozen=True)
class CurveRow:
    """A channel group of a table: its layers, and the metric at each of the table's ratios, "" where not tried."""

    layers: str
    channels: int
    values: tuple[str, ...]


@dataclass(frozen=True)
class CurveTable:
    """The curves of one stage of one run as texts."""

    where: str
    importance: str
    samples: int
    unpruned: str
    ratios: tuple[str, ...]
    rows: tuple[CurveRow, ...]


def sensitivity_tables(runs: Sequence[RunReport]) -> list[CurveTable]:
    """The numbers of the sensitivity plots, one table for each stage of each run that measured any."""
    return [
        _table(f"{label}, {plain(stage.name)}", run, stage.sensitivity)
        for label, run in zip(labels(runs), runs, strict=True)
        for stage in run.stages
        if stage.sensitivity is not None
    ]


def _table(where: str, run: RunReport, found: Sensitivity) -> CurveTable:
    ratios = sorted({ratio for curve in found.curves for ratio in curve.points})
    rows = [
        CurveRow(
            plain(listed(curve.layers, 6)),
            curve.channels,
            tuple(metric_text(run, curve.points[ratio]) if ratio in curve.points else "" for ratio in ratios),
        )
        for curve in found.curves
    ]
    unpruned, shares = metric_text(run, found.metric), tuple(f"{100 * ratio:g} %" for ratio in ratios)
    return CurveTable(where, plain(found.importance), found.samples, unpruned, shares, tuple(rows))
