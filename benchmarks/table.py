"""RESULTS.md from the records."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import summary
from benchmarks.memory import HOW
from benchmarks.records import CaseRecord, Environment, Results, Row, SeriesRecord

_HEAD = f"""# Benchmarks

Made by `python -m benchmarks`; every number is in `results.json` too.

Each result is checked before anything is timed; a wrong one stops the case. Competitors of one framework share a
process and take turns (A B A B ...); frameworks have processes of their own and are not compared with each other.
Times are medians, IQR is the interquartile range, the ratio is the row's median over the first row's, or, where the
column speaks of times as fast, the first row's over the row's. Building and
copying the model, imports and the warm-up runs are not timed. A load average above the number of threads means that
other programs were running too: such times are too long, and parallel ones can be many times too long.

{HOW}
"""


def markdown(results: Results) -> str:
    """The whole page."""
    parts = [_HEAD]
    for name, case in results.cases.items():
        parts.extend(_case(name, case))
    return "\n".join(parts)


def _case(name: str, case: CaseRecord) -> Iterator[str]:
    yield f"## {name}\n\n{case.title}\n\n{_environment(case.environment)}\n"
    for framework, series in case.series.items():
        yield f"### {framework}\n\n{_series(series)}\n\n{table(series)}\n"


def _environment(item: Environment) -> str:
    return (
        f"{item.processor}, {item.cores} cores, {item.memory_gib:.0f} GiB; {item.system}, Python {item.python}; "
        f"commit {item.commit}; {item.date}."
    )


def _series(item: SeriesRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in item.versions.items())
    settings = "".join(f", {name}={value}" for name, value in item.settings.items())
    return (
        f"{versions}; threads: {item.threads}{settings}; {len(item.rows[0].seconds)} repetitions after "
        f"1 checked and {item.warmup} warm-up runs; load average {item.load_before:.1f} before, "
        f"{item.load_after:.1f} after."
    )


def table(series: SeriesRecord) -> str:
    """One row for each competitor, the columns of facts in the order of the first row."""
    facts = list(dict.fromkeys(key for row in series.rows for key in row.facts))
    memory = (
        ["peak extra memory MB", "x weights"] if any(row.peak_extra_bytes is not None for row in series.rows) else []
    )
    head = ["competitor", "median ms", "IQR ms", series.ratio, *facts, *memory, "notes"]
    first, _ = summary(series.rows[0].seconds)
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    lines += [_cells(row, facts, first, series, bool(memory)) for row in series.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Row, facts: list[str], first: float, series: SeriesRecord, memory: bool) -> list[str]:
    median, spread = summary(row.seconds)
    numbers = [f"{row.facts[key]:,}" if key in row.facts else "" for key in facts]
    ratio = first / median if series.faster else median / first
    parts = _memory(row.peak_extra_bytes, series.weights_bytes) if memory else []
    return [row.name, f"{median:.1f}", f"{spread:.1f}", f"{ratio:.2f}", *numbers, *parts, row.note]


def _memory(peak: int | None, weights: int | None) -> list[str]:
    share = "" if peak is None or not weights else f"{peak / weights:.2f}"
    return ["not measured" if peak is None else f"{peak / 1e6:.0f}", share]
