"""The plots of the page, as plotly specifications without colours."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from slimbridge.report.figures import (
    arrow,
    baseline,
    labels,
    latency_ratio,
    metric_scale,
    metric_text,
    metric_unit,
    plain,
    ratio,
    simulated,
    times,
)
from slimbridge.report.plots_pruning import sensitivity_plots, sparsity_plot
from slimbridge.report.records import EpochRecord, RunReport, StageRecord
from slimbridge.report.traces import PATTERNS, SYMBOLS, Plot, finite, line, safe, sentence, span, ticks

_RATIOS = (
    ("Parameters", "parameters", ""),
    ("MACs", "macs", ""),
    ("File size", "size_bytes", ""),
    ("Latency", "latency", "To the same backend's own baseline. A simulated number format has no ratio."),
)


def plots_of(runs: Sequence[RunReport]) -> list[Plot]:
    """All plots of the page, in order; none when no run has a stage."""
    stages = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    if not stages:
        return []
    return [
        _metric_plot(runs, stages),
        *_recovery_plot(runs, stages),
        *_ratio_plots(runs, stages),
        *(plot for name in stages for plot in _loss_plot(runs, name)),
        *(plot for name in stages for plot in sparsity_plot(runs, name)),
        *(plot for name in stages for plot in sensitivity_plots(runs, name)),
    ]


def _metric_plot(runs: Sequence[RunReport], stages: Sequence[str]) -> Plot:
    traces = []
    for series, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        values = [finite(metric_scale(run) * stage.metric) for stage in run.stages]
        hovers = [
            f"{label}, {plain(stage.name)}: {metric_text(run, stage.metric)}{metric_unit(run)}" for stage in run.stages
        ]
        positions = [stages.index(stage.name) for stage in run.stages]
        traces.append(line(series, positions, values, hovers))
    title = f"{sentence(runs[0].metric_name)} after each stage{metric_unit(runs[0]).replace(' ', ', ')}"
    vertical: dict[str, Any] = {"range": span([y for trace in traces for y in trace["y"]])}
    layout = {"height": 320, "xaxis": {**ticks(stages), "range": [-0.4, len(stages) - 0.6]}, "yaxis": vertical}
    return Plot(title, "The axis does not start at 0.", tuple(traces), layout, wide=True)


def _recovery_plot(runs: Sequence[RunReport], stages: Sequence[str]) -> list[Plot]:
    """From the metric right after a stage's change (hollow) to the one after its training (filled)."""
    shown = [name for name in stages if any(s.name == name and _recovered(s) for run in runs for s in run.stages)]
    traces: list[dict[str, Any]] = []
    for series, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        offset = (series - (len(runs) - 1) / 2) * 0.5 / max(1, len(runs))
        for stage in (stage for stage in run.stages if _recovered(stage)):
            before, after = stage.metric_before_training or 0.0, stage.metric
            symbol = SYMBOLS[series % len(SYMBOLS)]
            change = arrow(metric_text(run, before), metric_text(run, after))
            hover = f"{label}, {plain(stage.name)}: {change}{metric_unit(run)}"
            scale = metric_scale(run)
            row = shown.index(stage.name) + offset
            traces.append(
                {
                    **line(series, [scale * before, scale * after], [row, row], [hover, hover]),
                    "marker": {"size": 10, "symbol": [f"{symbol}-open", symbol]},
                }
            )
    if not shown:
        return []
    layout = {
        "height": 90 + 30 * len(shown) * len(runs),
        "xaxis": {"range": [-4, 104], "ticksuffix": " %"} if runs[0].metric_is_share else {},
        "yaxis": {**ticks(shown), "range": [len(shown) - 0.5, -0.5]},
    }
    caption = "Hollow: right after the stage's change. Filled: after its training."
    title = f"{sentence(runs[0].metric_name)} before and after training{metric_unit(runs[0]).replace(' ', ', ')}"
    return [Plot(title, caption, tuple(traces), layout, wide=True)]


def _recovered(stage: StageRecord) -> bool:
    return stage.metric_before_training is not None and isfinite(stage.metric_before_training + stage.metric)


def _ratio_plots(runs: Sequence[RunReport], stages: Sequence[str]) -> list[Plot]:
    plots = []
    for title, attribute, caption in _RATIOS:
        named = enumerate(zip(labels(runs), runs, strict=True))
        bars = [_bars(series, label, run, stages, attribute) for series, (label, run) in named]
        plots.append(_ratio_plot(title, caption, bars, stages))
    return plots


def _ratio_plot(title: str, caption: str, bars: Sequence[dict[str, Any]], stages: Sequence[str]) -> Plot:
    largest = max((x for trace in bars for x in trace["x"] if x is not None), default=1.0)
    layout = {
        "height": 60 + len(stages) * (16 + 18 * len(bars)),
        "barmode": "group",
        "bargap": 0.3,
        "xaxis": {"range": [0, 1.3 * max(largest, 1.0)], "showticklabels": False, "showgrid": False},
        "yaxis": {**ticks(stages), "range": [len(stages) - 0.5, -0.5]},
    }
    return Plot(f"{title}, share of the baseline", caption, tuple(bars), layout)


def _bars(series: int, label: str, run: RunReport, stages: Sequence[str], attribute: str) -> dict[str, Any]:
    base = baseline(run)
    shares: list[float | None] = []
    for stage in run.stages:
        if attribute == "latency" or base is None:
            shares.append(latency_ratio(stage, base))
        else:
            shares.append(ratio(getattr(stage, attribute), getattr(base, attribute)))
    hidden = attribute == "latency"
    texts = [
        times(share) or ("simulated" if hidden and simulated(stage) else "no ratio")
        for share, stage in zip(shares, run.stages, strict=True)
    ]
    return {
        "type": "bar",
        "orientation": "h",
        "x": [share or 0.0 for share in shares],
        "y": [stages.index(stage.name) for stage in run.stages],
        "text": texts,
        "textposition": "outside",
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [safe(f"{label}, {stage.name}: {text}") for stage, text in zip(run.stages, texts, strict=True)],
        "marker": {"pattern": {"shape": PATTERNS[series % len(PATTERNS)], "fillmode": "overlay", "size": 6}},
        "meta": {"series": series},
    }


def _loss_plot(runs: Sequence[RunReport], name: str) -> list[Plot]:
    """Total loss over the epochs of one stage; nothing when no run trained in it."""
    traces = []
    for series, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
        for stage in run.stages:
            if stage.name == name and stage.epochs:
                epochs = [record.epoch for record in stage.epochs]
                losses = [finite(sum(record.terms.values())) for record in stage.epochs]
                traces.append(line(series, epochs, losses, [_epoch_hover(label, r) for r in stage.epochs]))
    if not traces:
        return []
    steps = {"dtick": 1} if max(len(trace["x"]) for trace in traces) <= 12 else {"tickformat": "d"}
    layout = {"height": 240, "xaxis": {**steps, "title": {"text": "epoch"}}, "yaxis": {"rangemode": "tozero"}}
    return [Plot(f"Training loss, {plain(name)}", "", tuple(traces), layout)]


def _epoch_hover(label: str, record: EpochRecord) -> str:
    terms = "".join(f"\n{plain(name)}: {value:.4g}" for name, value in record.terms.items())
    return f"{label}, epoch {record.epoch}: {sum(record.terms.values()):.4g}{terms}"
