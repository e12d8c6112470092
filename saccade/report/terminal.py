"""The comparison in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saccade.report.positions import as_perplexity, position_table
from saccade.report.record import Report
from saccade.report.table import (
    COLUMNS,
    COST,
    QUALITY,
    Cell,
    Column,
    cells,
    groups,
    label,
    notes,
    summary,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

STYLES = {True: "green", False: "red", None: "dim"}


def print_report(report: Report, console: Console) -> None:
    """Print summary, table, perplexity by position and notes.

    In a narrow console cost and quality become two tables, and in a very narrow one the ratio
    stands below its value.  Names from the record are never read as markup.
    """
    from rich.text import Text

    console.print(Text(summary(report), style="dim"))
    for table in _comparison(report, console):
        console.print()
        console.print(table)
    for part in (*_by_position(report), _notes(report)):
        console.print(part)


def _comparison(report: Report, console: Console) -> list[Table]:
    """The widest layout that fits."""
    from rich.measure import Measurement

    options = console.options.update(max_width=10_000)
    for parts, stacked in (((COLUMNS,), False), ((COST, QUALITY), False), ((COST, QUALITY), True)):
        tables = [_table(report, part, stacked=stacked) for part in parts]
        if all(Measurement.get(console, options, t).maximum <= console.width for t in tables):
            break
    return tables


def _table(report: Report, columns: Sequence[Column], *, stacked: bool) -> Table:
    from rich.text import Text

    table = _frame()
    table.add_column("")
    for column in columns:
        table.add_column(f"{column.title}\n{column.unit}".strip(), justify="right", no_wrap=True)
    baseline = report.baseline_row()
    for name, rows in groups(report):
        table.add_row(Text(name, style="bold"))
        for row in rows:
            shown = [_cell(cell, stacked=stacked) for cell in cells(row, baseline, columns)]
            style = "bold" if row.name == report.baseline else ""
            table.add_row(Text(f"  {label(row, report)}", style=style), *shown)
    return table


def _frame() -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False)


def _cell(cell: Cell, *, stacked: bool) -> Text:
    from rich.text import Text

    text = Text(cell.text, style="" if cell.ratio or cell.better is None else STYLES[cell.better])
    if cell.ratio:
        text.append(f"\n{cell.ratio}" if stacked else f" ({cell.ratio})", STYLES[cell.better])
    return text


def _by_position(report: Report) -> list[RenderableType]:
    from rich.text import Text

    found = position_table(report)
    if found is None:
        return []
    title = f"\nPerplexity by position, in blocks of {found.block:,} tokens"
    title += " (* past the trained length)" if any(found.past_training) else ""
    table = _frame()
    table.add_column("from token")
    for heading in found.headings():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, values in found.lines:
        shown = []
        for column, value in enumerate(values):
            verdict = found.verdict(column, value)
            shown.append(Text(as_perplexity(value), "" if verdict is None else STYLES[verdict]))
        table.add_row(Text(f"  {name}"), *shown)
    return [Text(title, style="bold"), table]


def _notes(report: Report) -> Text:
    from rich.text import Text

    lines = notes(report)
    text = Text("\nNotes" if lines else "", style="bold")
    for name, note in lines:
        text.append(f"\n  {name}: ", style="not bold")
        text.append(note, style="not bold dim")
    return text
