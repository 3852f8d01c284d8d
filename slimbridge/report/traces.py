"""What all plots are made of: a specification without colours, its lines, ticks and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from typing import Any

from slimbridge.report.figures import plain

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
PATTERNS = ("", "/", "x", "-", "|", ".")


@dataclass(frozen=True)
class Plot:
    """A plot without colours: the page's script adds those of the current theme.

    Attributes:
        title: heading above the plot.
        caption: one sentence under it, "" for none.
        data: plotly traces; `meta.series` is the number of the run whose colour a trace takes.
        layout: plotly layout, `height` in pixels included.
        wide: over the whole width of the page.
        part: section of the page, "" for the one that is called plots.
    """

    title: str
    caption: str
    data: tuple[dict[str, Any], ...]
    layout: dict[str, Any]
    wide: bool = False
    part: str = ""


def span(values: Iterable[float | None]) -> list[float] | None:
    """Room above and below, at least two points in all, so that noise does not look like a cliff."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    room = max(0.12 * (high - low), 1 - (high - low) / 2, 0.3)
    return [low - room, high + room]


def line(series: int, x: Sequence[float], y: Sequence[float | None], hovers: Sequence[str]) -> dict[str, Any]:
    """Later series are dashed and smaller, so that equal curves show both; `hovers` are lines of plain text."""
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": list(x),
        "y": list(y),
        "hovertext": [escape(hover).replace("\n", "<br>") for hover in hovers],
        "hoverinfo": "text",
        "cliponaxis": False,
        "line": {"width": 3.5 if series == 0 else 2, "dash": DASHES[series % len(DASHES)]},
        "marker": {"size": 10 if series == 0 else 8, "symbol": SYMBOLS[series % len(SYMBOLS)]},
        "meta": {"series": series},
    }


def ticks(names: Sequence[str]) -> dict[str, Any]:
    """Named positions 0, 1, ...; a category axis would guess dates and numbers from the names."""
    texts = [safe(name) for name in names]
    return {"tickvals": list(range(len(names))), "ticktext": texts, "autotickangles": [0, -35]}


def safe(text: str) -> str:
    """For text inside a plot, where plotly reads a few HTML tags."""
    return escape(plain(text))


def sentence(text: str) -> str:
    """With a capital, the rest as it was."""
    return plain(text[:1].upper() + text[1:])


def finite(value: float) -> float | None:
    """JSON has no NaN; a gap in the curve says it."""
    return value if isfinite(value) else None
