"""Tables and the comparison in a terminal.  Names from a record are never read as markup."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saccade.report.columns import COLUMNS, COST, QUALITY, comparison_table, notes, summary
from saccade.report.comparison import Report
from saccade.report.positions import position_table
from saccade.report.table import Cell, Table

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table as RichTable
    from rich.text import Text

STYLES = {True: "green", False: "red", None: ""}
NAMES = {"group": "bold", "base": "bold", "peer": "dim", "row": ""}
PIPE_WIDTH = 180  # columns of a table that goes into a file: nothing is folded


def to_stdout() -> Console:
    """A console on stdout: as wide as the terminal, wide enough for every table in a pipe."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_report(report: Report, console: Console) -> None:
    """Print summary, table, perplexity by position and notes.

    In a narrow console cost and quality become two tables, and in a very narrow one the ratio
    stands below its value.
    """
    from rich.text import Text

    console.print(Text(summary(report), style="dim"))
    for table in _comparison(report, console):
        console.print()
        console.print(table)
    for part in (*_by_position(report), _notes(report)):
        console.print(part)


def drawn(table: Table, *, stacked: bool = False) -> RichTable:
    """A table for a rich console; `stacked` puts ratios below their values."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    grouped = any(line.kind == "group" for line in table.lines)
    made = RichTable(box=SIMPLE_HEAD, header_style="bold", show_edge=False, pad_edge=False)
    made.add_column(table.corner)
    for heading in table.headings:
        title = f"{heading.title}\n{heading.unit}".strip()
        made.add_column(title, justify="right" if heading.right else "left", no_wrap=heading.right)
    for line in table.lines:
        indent = "  " if grouped and line.kind != "group" else ""
        name = Text(indent + line.name, style=NAMES[line.kind])
        made.add_row(name, *(_cell(cell, stacked) for cell in line.cells))
    return made


def _cell(cell: Cell | Sequence[Cell], stacked: bool) -> Text:
    from rich.text import Text

    if not isinstance(cell, Cell):
        return Text("\n").join(_cell(part, stacked) for part in cell)
    if not cell.ratio:
        return Text(cell.text, style=STYLES[cell.better])
    ratio = f"\n{cell.ratio}" if stacked else f" ({cell.ratio})"
    return Text.assemble(cell.text, (ratio, STYLES[cell.better] or "dim"))


def _comparison(report: Report, console: Console) -> list[RichTable]:
    """The widest layout that fits."""
    from rich.measure import Measurement

    options = console.options.update(max_width=10_000)
    tables: list[RichTable] = []
    for parts, stacked in (((COLUMNS,), False), ((COST, QUALITY), False), ((COST, QUALITY), True)):
        tables = [drawn(comparison_table(report, part), stacked=stacked) for part in parts]
        if all(Measurement.get(console, options, t).maximum <= console.width for t in tables):
            break
    return tables


def _by_position(report: Report) -> list[RenderableType]:
    from rich.text import Text

    found = position_table(report)
    if found is None:
        return []
    title = f"\nPerplexity by position, in blocks of {found.block:,} tokens"
    title += " (* past the trained length)" if any(found.past_training) else ""
    return [Text(title, style="bold"), drawn(found.table())]


def _notes(report: Report) -> Text:
    from rich.text import Text

    lines = notes(report)
    text = Text("\nNotes" if lines else "", style="bold")
    for name, note in lines:
        text.append(f"\n  {name}: ", style="not bold")
        text.append(note, style="not bold dim")
    return text
