"""Words and rows of a run's measured exports, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimbridge.report.deploy_records import Deployment, Timed
from slimbridge.report.figures import factor, labels, milliseconds, percent, plain, size, times
from slimbridge.report.records import RunReport


@dataclass(frozen=True)
class Warned:
    """A form that is slower than float: the words, and whether by more than the times vary."""

    text: str
    certain: bool


@dataclass(frozen=True)
class DeployRow:
    """One form in one runtime as texts; "" where there is nothing to tell.

    Attributes:
        runtime: name and version, "" where it is that of the row above.
        of_float, of_eager: time as a factor of the float baseline in the same runtime, and of the eager one.
        difference: of the outputs where the largest output says nothing.
        slower: is it an integer form that is slower than float by more than the times vary?
    """

    runtime: str
    form: str
    of: str
    latency: str
    spread: str
    of_float: str
    of_eager: str
    size: str
    agreement: str
    difference: str
    layers: str
    slower: bool


@dataclass(frozen=True)
class Deployed:
    """All that is told of one run's exports.

    Attributes:
        label: of the run.
        series: its number.
        warnings: integer forms that are slower than float.
        headline: the fastest compressed form in one line.
        rows: each form in each runtime.
        notes: of the exports, each once.
        failed: what is not there, and why.
        how: how it was measured, one sentence each.
    """

    label: str
    series: int
    warnings: tuple[Warned, ...]
    headline: str
    rows: tuple[DeployRow, ...]
    notes: tuple[str, ...]
    failed: tuple[str, ...]
    how: tuple[str, ...]


def all_deployed(runs: Sequence[RunReport]) -> list[Deployed]:
    """One entry for each run whose exports were measured."""
    return [
        deployed(run.deployment, label, series)
        for series, (label, run) in enumerate(zip(labels(runs), runs, strict=True))
        if run.deployment is not None
    ]


def deployed(found: Deployment, label: str, series: int = 0) -> Deployed:
    """The texts of one deployment."""
    return Deployed(
        label=plain(label),
        series=series,
        warnings=_warnings(found),
        headline=_headline(found),
        rows=_rows(found),
        notes=_notes(found),
        failed=tuple(plain(line) for line in found.failed),
        how=_how(found),
    )


def form_name(row: Timed) -> str:
    """A form in a sentence, e.g. "int8", "paddle_int8", "float"."""
    if row.form == "onnx":
        return "int8" if row.integer else "float"
    return plain(row.form) + (" int8" if row.integer and "int8" not in row.form else "")


def deployed_latency(found: Deployment) -> tuple[str, str] | None:
    """The best integer form against the eager baseline, and the values behind it; None when that was not measured."""
    best, eager = found.best(), found.eager()
    if best is None or eager is None or not best.integer or found.against_eager(best) is None:
        return None
    share = found.against_float(best)
    there = factor(1.0, share, "faster than", "slower than") if share else ""
    within = f"; {there.replace('unchanged', 'as fast as')} float there" if there else ""
    values = f"{milliseconds(eager.median_ms)} \u2192 {milliseconds(best.median_ms)} ms"
    where = f"{form_name(best)} in {plain(best.runtime)} against {plain(eager.runtime)}"
    return factor(eager.median_ms, best.median_ms, "faster", "slower"), f"{values}, {where}{within}"


def _warnings(found: Deployment) -> tuple[Warned, ...]:
    pairs = [(row, found.reference(row)) for row in found.slower()]
    slow = tuple(_warned(row, base) for row, base in pairs if base is not None)
    lost = (line for line in found.failed if "of the compressed model" in line and "not timed" in line)
    return (*(Warned(plain(line), True) for line in lost), *slow)


def _certain(row: Timed, base: Timed | None) -> bool:
    return base is not None and not row.median_ms - base.median_ms <= max(row.spread_ms, base.spread_ms)


def _warned(row: Timed, base: Timed) -> Warned:
    certain = _certain(row, base)
    word = "SLOWER than" if certain else "no faster than"
    if base.runtime == row.runtime:
        claim = f"{form_name(row)} is {word} the uncompressed float model in {plain(row.runtime)}"
    else:
        claim = f"{form_name(row)} in {plain(row.runtime)} is {word} {plain(base.runtime)} float32"
    values = f"{milliseconds(row.median_ms)} ms against {milliseconds(base.median_ms)}"
    return Warned(f"{claim}: {values}{'' if certain else ', less apart than the times vary'}", certain)


def _headline(found: Deployment) -> str:
    best = found.best()
    if best is None:
        return "no form of the compressed model was timed"
    eager, base = found.eager(), found.float_base(best)
    parts = [
        _speed(found.against_eager(best), f"{plain(eager.runtime)} float32" if eager else ""),
        _speed(found.against_float(best), "the uncompressed float model in the same runtime"),
    ]
    if base is not None and base.size_bytes and best.size_bytes:
        smaller = factor(base.size_bytes, best.size_bytes, "smaller", "larger")
        parts.append(f"file {smaller}" if smaller != "unchanged" else "file as large")
    told = ", ".join(part for part in parts if part) or f"{milliseconds(best.median_ms)} ms"
    return f"{form_name(best)} in {plain(best.runtime)}: {told}"


def _speed(share: float | None, base: str) -> str:
    """From a time over the base's: "3.4x as fast as ...", or the other way round; "" when there is none."""
    if share is None:
        return ""
    if f"{share:.2f}" == "1.00":
        return f"as fast as {base}"
    return f"{1 / share:.3g}x as fast as {base}" if share < 1 else f"takes {share:.3g}x as long as {base}"


def _rows(found: Deployment) -> tuple[DeployRow, ...]:
    order = list(dict.fromkeys(row.runtime for row in found.timed))
    slower = [row for row in found.slower() if _certain(row, found.reference(row))]
    rows, last = [], None
    for row in sorted(found.timed, key=lambda row: (order.index(row.runtime), row.of != "baseline")):
        rows.append(_row(found, row, "" if row.runtime == last else plain(row.runtime), row in slower))
        last = row.runtime
    return tuple(rows)


def _row(found: Deployment, row: Timed, runtime: str, slower: bool) -> DeployRow:
    eager = row.form == "eager"
    return DeployRow(
        runtime=runtime,
        form=plain(row.form),
        of=row.of,
        latency=milliseconds(row.median_ms),
        spread=milliseconds(row.spread_ms) if row.spread_ms >= 9.995 else f"{row.spread_ms:.2g}",
        of_float="" if eager or row is found.float_base(row) else times(found.against_float(row)),
        of_eager="" if row is found.eager() else times(found.against_eager(row)),
        size="" if row.size_bytes is None else size(row.size_bytes),
        agreement="" if row.agreement is None else f"{percent(row.agreement)} %",
        difference="" if eager or row.agreement is not None else f"{row.difference:.2g}",
        layers=", ".join(f"{plain(kind)} {done}/{every}" for kind, (done, every) in row.fused.items()),
        slower=slower,
    )


def _notes(found: Deployment) -> tuple[str, ...]:
    """Each different note once, after the forms that it belongs to."""
    forms: dict[str, dict[str, None]] = {}
    for export in found.exports:
        for note in export.notes:
            forms.setdefault(plain(note), {})[f"{plain(export.form)} of the {export.of} model"] = None
    return tuple(f"{', '.join(names)}: {note}" for note, names in forms.items())


def _how(found: Deployment) -> tuple[str, ...]:
    threads = "1 thread" if found.threads == 1 else f"{found.threads} threads"
    rounds = "1 round" if found.rounds == 1 else f"{found.rounds} rounds"
    where = plain(found.processor or found.machine)
    samples = max((export.samples for export in found.exports), default=0)
    eager = found.eager()
    to_eager = f", or to {plain(eager.runtime)} in float" if eager else ""
    lines = [
        f"Measured with {threads}, batch {found.batch}, median (interquartile range) of {rounds} in turns, on {where}.",
        f"Ratios of time are to the float baseline in the same runtime{to_eager}.",
    ]
    if samples:
        inputs = "1 sample" if samples == 1 else f"{samples} samples"
        alone = any(row.agreement is None and row.form != "eager" for row in found.timed)
        other = "; where that says nothing, the relative L2 difference of the outputs" if alone else ""
        lines.append(f"Agreement: share of {inputs} whose largest output is the one of the run's own model{other}.")
    return tuple(lines)
