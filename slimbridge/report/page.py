"""A page from a template: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from slimbridge.report.figures import figure
from slimbridge.report.traces import Plot


def render_page(template: str, plots: Sequence[Plot], **given: Any) -> str:
    """The page as text, about 5 MB since it holds the plotting library.

    Args:
        template: file name in the folder of templates.
        plots: the page's plots; the template says where each part of them stands.
        given: what else the template names; strings are escaped.
    """
    return (
        _environment()
        .get_template(template)
        .render(
            plots=plots,
            plot_specs=[{"data": plot.data, "layout": plot.layout} for plot in plots],
            plotly=Markup(get_plotlyjs()),
            **given,
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment
