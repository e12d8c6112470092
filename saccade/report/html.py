"""The comparison as one self-contained page: nothing is fetched, the record itself is inside."""

from __future__ import annotations

import base64
from importlib import resources
from typing import Any

from saccade.report.columns import COLUMNS, comparison_table, notes, summary
from saccade.report.comparison import Report
from saccade.report.figures import to_png
from saccade.report.numbers import as_fact, fact_name
from saccade.report.positions import position_table

_FACTS = (
    ("Model", "model"),
    ("Text", "text"),
    ("Settings", "settings"),
    ("Environment", "environment"),
)


def to_html(report: Report, *, picture: bytes | None = None) -> str:
    """The page as text; `picture` is the PNG of `figures.to_png`, drawn here where not given.

    Raises:
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    from jinja2 import Environment, StrictUndefined

    source = resources.files("saccade.report").joinpath("page.html.jinja").read_text("utf-8")
    # autoescape: names and notes come from files and errors, never from us.
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(source)
    return page.render(
        report=report,
        summary=summary(report),
        picture=base64.b64encode(to_png(report) if picture is None else picture).decode(),
        columns=COLUMNS,
        comparison=comparison_table(report),
        positions=position_table(report, most=17),
        notes=notes(report),
        facts=[(title, _facts(getattr(report, name))) for title, name in _FACTS],
        record=_embeddable(report.to_json()),
    )


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(fact_name(name), as_fact(name, value)) for name, value in facts.items()]


def _embeddable(json_text: str) -> Any:
    """JSON that cannot end the script element it stands in: `<` is written as an escape."""
    from markupsafe import Markup

    return Markup(json_text.replace("<", "\\u003c").replace("&", "\\u0026"))
