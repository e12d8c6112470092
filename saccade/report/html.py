"""The comparison as one self-contained page: nothing is fetched, the record itself is inside."""

from __future__ import annotations

from importlib import resources
from typing import Any

from saccade.report.claims import claims_table
from saccade.report.columns import COLUMNS, comparison_table, shown
from saccade.report.comparison import Report
from saccade.report.notes import key, notes, summary
from saccade.report.numbers import as_fact, fact_name
from saccade.report.pareto import pareto_svg, points_of
from saccade.report.positions import position_table, positions_chart
from saccade.report.sweep import sweep_charts, sweep_tables

_FACTS = (
    ("Model", "model"),
    ("Text", "text"),
    ("Settings", "settings"),
    ("Environment", "environment"),
)


def to_html(report: Report) -> str:
    """The page as text; its pictures are SVG and follow the reader's colour scheme.

    Raises:
        ModuleNotFoundError: jinja2 is not installed.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files("saccade.report").joinpath("page.html.jinja").read_text("utf-8")
    # autoescape: names and notes come from files and errors, never from us.
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(source)
    return page.render(
        report=report,
        summary=summary(report),
        key=key(report, place="Below each value"),
        columns=shown(COLUMNS, report.rows),
        comparison=comparison_table(report),
        notes=notes(report),
        pareto=Markup(pareto_svg(points_of(report))),
        sweep=sweep_tables(report),
        charts=[Markup(chart) for chart in sweep_charts(report)],
        positions=position_table(report, most=17),
        curves=Markup(positions_chart(report)),
        claims=claims_table(report),
        options=[(row.name, as_fact("", row.options)) for row in report.rows if row.options],
        facts=[(title, _facts(getattr(report, name))) for title, name in _FACTS],
        record=_embeddable(report.to_json()),
    )


def _facts(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(fact_name(name), as_fact(name, value)) for name, value in facts.items()]


def _embeddable(json_text: str) -> Any:
    """JSON that cannot end the script element it stands in: `<` is written as an escape."""
    from markupsafe import Markup

    return Markup(json_text.replace("<", "\\u003c").replace("&", "\\u0026"))
