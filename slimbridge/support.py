"""The table of what is supported, generated from the registries; writes it between two marks of a Markdown file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slimbridge.errors import RunError
from slimbridge.files import write_file

BEGIN, END = "<!-- supported: begin -->", "<!-- supported: end -->"


def support_table() -> str:
    """Markdown: everything that a plan may name, and where it comes from."""
    lines = ["| sort | name | what it is |", "|---|---|---|"]
    lines += [f"| {sort} | `{name}` | {text} |" for sort, name, text in _rows()]
    return "\n".join(lines)


def updated(text: str) -> str:
    """The text with the table between the marks made anew; RunError when a mark is missing."""
    if BEGIN not in text or END not in text:
        raise RunError(f"the text has no marks '{BEGIN}' and '{END}'")
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{support_table()}\n{END}{rest.split(END, 1)[1]}"


def _rows() -> Iterator[tuple[str, str, str]]:
    from slimbridge import zoo
    from slimbridge.discovery import backend_names
    from slimbridge.plan import registries, shipped_plans
    from slimbridge.tasks import DATA_SETS, metrics

    for name in backend_names():
        yield "backend", name, f"`pip install 'slimbridge[{name}]'`"
    for name in registries.IMPORTANCES.names():
        yield "importance", name, _first_sentence(registries.IMPORTANCES.get(name))
    for name in registries.OBSERVERS.names():
        yield "observer", name, _first_sentence(registries.OBSERVERS.get(name))
    for name in registries.LOSSES.names():
        loss = registries.LOSSES.get(name)
        yield "loss", name, f"{_first_sentence(loss.function)} ({loss.source})"
    for name in registries.SCHEDULES.names():
        yield "schedule", name, _first_sentence(registries.SCHEDULES.get(name))
    for name, entry in zoo.models().items():
        yield "zoo model", name, f"{entry.doc} ({entry.paper.rsplit(',', 1)[-1].strip()})"
    for name, load in DATA_SETS.items():
        yield "data", name, _first_sentence(load)
    for name, metric in metrics.METRICS.items():
        yield "metric", name, _first_sentence(metric)
    for name in shipped_plans():
        yield "plan", name, "shipped"


def _first_sentence(thing: Any) -> str:
    paragraph = " ".join((thing.__doc__ or "").strip().split("\n\n")[0].split())
    return paragraph.rstrip(".").replace("|", "\\|")


def main() -> None:
    """Rewrite the table of the file that is named."""
    path = Path(sys.argv[1])
    write_file(path, updated(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
