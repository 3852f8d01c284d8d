"""Units, words and rows that the terminal's tables and the page share."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite

from slimbridge.report.records import LatencyRecord, RunReport, StageRecord, Verdict

LATENCY_RULE = (
    "Latency ratios are to the same backend's baseline; times of different frameworks' eager modes are not comparable."
)
LONG_NAME = 16
"""Letters of a stage's name that a table shows on one line."""


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


def metric_scale(run: RunReport) -> float:
    """Factor by which the run's metric is shown: 100 for a share, which is shown as per cent, else 1."""
    return 100.0 if run.metric_is_share else 1.0


def metric_unit(run: RunReport) -> str:
    """A space and the sign of per cent for a share, else nothing."""
    return " %" if run.metric_is_share else ""


def metric_text(run: RunReport, value: float) -> str:
    """The metric's value, without its unit."""
    return percent(value) if run.metric_is_share else f"{value:.5g}"


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


def factor(before: float, after: float, better: str, worse: str) -> str:
    """How many times smaller `after` is, or larger, e.g. "6.87x smaller"; "unchanged", "no ratio"."""
    down, up = ratio(before, after), ratio(after, before)
    if down is None or up is None:
        return "no ratio"
    if f"{down:.2f}" == "1.00":
        return "unchanged"
    return f"{down:.3g}x {better}" if down > 1 else f"{up:.3g}x {worse}"


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
    return tuple(_stage_row(run, stage, base) for stage in run.stages)


def _stage_row(run: RunReport, stage: StageRecord, base: StageRecord | None) -> StageRow:
    other = None if stage is base else base

    def share(value: float, of: float | None) -> str:
        return "" if of is None else times(ratio(value, of))

    return StageRow(
        name=plain(stage.name),
        metric=metric_text(run, stage.metric),
        before="" if stage.metric_before_training is None else metric_text(run, stage.metric_before_training),
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


def arrow(before: str, after: str) -> str:
    """`before -> after`, with a typographic arrow."""
    return f"{before} \u2192 {after}"


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
