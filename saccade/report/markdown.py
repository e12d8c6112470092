"""Tables and the comparison as GitHub-flavoured Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from saccade.report.columns import comparison_table, notes, summary
from saccade.report.comparison import Report
from saccade.report.positions import position_table
from saccade.report.table import Cell, Line, Table

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~$"} | {"\n": " ", "\r": " "})


def to_markdown(report: Report) -> str:
    """Summary, table, perplexity by position and notes; ends with a newline."""
    parts = [escape(summary(report)), table_text(comparison_table(report))]
    found = position_table(report)
    if found is not None:
        mark = "; \\* lies past the trained length" if any(found.past_training) else ""
        title = f"Perplexity by position, in blocks of {found.block:,} tokens{mark}:"
        parts += [title, table_text(found.table())]
    if lines := notes(report):
        parts.append("\n".join(f"- {escape(name)}: {escape(note)}" for name, note in lines))
    return "\n\n".join(parts) + "\n"


def table_text(table: Table) -> str:
    """The lines of a table, without a newline at the end."""
    headings = [escape(table.corner), *(escape(str(heading)) for heading in table.headings)]
    rule = ["---", *("---:" if heading.right else "---" for heading in table.headings)]
    return "\n".join([_joined(headings), _joined(rule), *(_line(x, table) for x in table.lines)])


def _line(line: Line, table: Table) -> str:
    if line.kind == "group":
        return _joined([f"**{escape(line.name)}**", *[""] * len(table.headings)])
    return _joined([escape(line.name), *(_cell(cell, table) for cell in line.cells)])


def _cell(cell: Cell | Sequence[Cell], table: Table) -> str:
    if not isinstance(cell, Cell):
        return "<br>".join(_cell(part, table) for part in cell)
    text = escape(str(cell))
    return f"**{text}**" if table.marks_best and cell.better else text


def _joined(parts: Sequence[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def escape(text: str) -> str:
    """Text that is never read as markup, on one line."""
    return text.translate(_SPECIAL)
