"""Tables and the comparison in a terminal.  Names from a record are never read as markup."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from saccade.report import evaluation
from saccade.report.claims import claims_table
from saccade.report.columns import COLUMNS, COST, QUALITY, Column, comparison_table
from saccade.report.comparison import Report
from saccade.report.diff import Difference, difference_table, status_changes
from saccade.report.notes import key, notes, summary
from saccade.report.positions import position_table
from saccade.report.sweep import sweep_tables
from saccade.report.table import Cell, Table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

STYLES = {True: "green", False: "red", None: ""}
REASON = 22  # letters of a line of a reason, so that no column is wider than its numbers
NAMES = {"group": "bold", "base": "bold", "peer": "dim", "row": ""}
LAYOUTS = (  # (columns of each table, whether ratios stand below their values)
    ((COLUMNS,), False),
    ((COST, QUALITY), False),
    ((COST, QUALITY), True),
    ((COST[:3], COST[3:], QUALITY), True),
)
PIPE_WIDTH = 260  # columns of a table that goes into a file: nothing is folded


def to_stdout() -> Console:
    """A console on stdout: as wide as the terminal, wide enough for every table in a pipe."""
    from rich.console import Console

    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_report(report: Report, console: Console) -> None:
    """Print summary, table, sweep, perplexity by position, claims and notes.

    In a narrow console cost and quality become two tables, and in a very narrow one the ratio
    stands below its value.
    """
    from rich.text import Text

    console.print(Text(summary(report), style="dim"))
    for table in fitting(lambda part: comparison_table(report, part), console):
        console.print()
        console.print(table)
    if said := key(report):
        console.print(Text(f"\n{said}", style="dim"))
    for title, table in _sections(report):
        console.print(Text(f"\n{title}", style="bold"))
        console.print(drawn(table))
    console.print(_notes(report))


def print_evaluation(report: evaluation.Evaluation, console: Console) -> None:
    """Print what was evaluated, a table for each length, and why scores are missing."""
    from rich.text import Text

    console.print(Text(evaluation.summary(report), style="dim"))
    for context in dict.fromkeys(result.context for result in report.results):
        console.print()
        console.print(drawn(evaluation.score_table(report, context)))
    console.print(Text(f"\n{evaluation.KEY}", style="dim"))
    for note in evaluation.notes(report):
        console.print(Text(f"  {note[:1].upper()}{note[1:]}", style="dim"))


def print_difference(found: Difference, console: Console) -> None:
    """Print what makes the comparison unfair, then old -> new of each row, then what is in one."""
    from rich.text import Text

    if found.unfair:
        console.print(Text("These records were not made alike:", style="bold"))
        console.print(Text("\n".join(f"  {line}" for line in found.unfair)))
    for name, report in (("old", found.old), ("new", found.new)):
        stopped = "" if report.complete else "; stopped before the end"
        said = f"{name}: revision {report.revision or 'unknown'}, {report.date}{stopped}"
        console.print(Text(said, style="dim"))
    for table in fitting(lambda part: difference_table(found, part), console):
        console.print()
        console.print(table)
    for title, lines in (("Did not run", status_changes(found)),
                         ("Only in the old record", found.old_only),
                         ("Only in the new record", found.new_only)):  # fmt: skip
        if lines:
            console.print(Text(f"\n{title}", style="bold"))
            console.print(Text("\n".join(f"  {line}" for line in lines)))


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
        narrow = zip(line.cells, table.headings, strict=False)
        cells = [_folded(cell) if heading.right else cell for cell, heading in narrow]
        made.add_row(name, *(_cell(cell, stacked) for cell in cells))
    return made


def _folded(cell: Cell | Sequence[Cell]) -> Cell | Sequence[Cell]:
    """The reason of a row that did not run on several short lines; numbers stay as they are."""
    if not isinstance(cell, Cell) or cell.ratio or len(cell.text) <= REASON:
        return cell
    return [Cell(part, better=cell.better) for part in textwrap.wrap(cell.text, REASON)]


def _cell(cell: Cell | Sequence[Cell], stacked: bool) -> Text:
    from rich.text import Text

    if not isinstance(cell, Cell):
        return Text("\n").join(_cell(part, stacked) for part in cell)
    style = STYLES[cell.better]
    if not cell.ratio:
        return Text(cell.text, style=style)
    ratio = f"\n{cell.ratio}" if stacked else f" ({cell.ratio})"
    expected = f"\nexpected {cell.expected}" if cell.expected else ""
    return Text.assemble(cell.text, (ratio, style or "dim"), (expected, "dim"))


def fitting(make: Callable[[Sequence[Column]], Table], console: Console) -> list[RichTable]:
    """What `make` draws of some columns: one table or several, the widest layout that fits."""
    from rich.measure import Measurement

    options = console.options.update(max_width=10_000)
    tables: list[RichTable] = []
    for parts, stacked in LAYOUTS:
        tables = [drawn(make(part), stacked=stacked) for part in parts]
        if all(Measurement.get(console, options, t).maximum <= console.width for t in tables):
            break
    return tables


def _sections(report: Report) -> list[tuple[str, Table]]:
    """What follows the comparison: (title, table)."""
    found = [(f"By length of the context: {title}", table) for title, table in sweep_tables(report)]
    positions = position_table(report)
    if positions is not None:
        title = f"Perplexity by position, in blocks of {positions.block:,} tokens"
        title += " (* past the trained length)" if any(positions.past_training) else ""
        found.append((title, positions.table()))
    if report.claims:
        found.append(("The chapter's claims and what was measured", claims_table(report)))
    return found


def _notes(report: Report) -> Text:
    from rich.text import Text

    lines = notes(report)
    text = Text("\nNotes" if lines else "", style="bold")
    for name, note in lines:
        text.append(f"\n  {name}: ", style="not bold")
        text.append(note, style="not bold dim")
    return text
