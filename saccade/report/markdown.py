"""Tables and the comparison as GitHub-flavoured Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from saccade.report import evaluation
from saccade.report.claims import claims_table
from saccade.report.columns import comparison_table
from saccade.report.comparison import Report
from saccade.report.notes import key, notes, summary
from saccade.report.positions import position_table
from saccade.report.sweep import sweep_tables
from saccade.report.table import Cell, Line, Table

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~$"} | {"\n": " ", "\r": " "})


def to_markdown(report: Report, part: str = "comparison") -> str:
    """One part of a record, or "all" of them; ends with a newline.

    Args:
        part: "comparison" (what was run, the table and its notes, short enough for a README),
            "sweep", "positions", "claims" or "all".

    Raises:
        KeyError: another part.
    """
    chosen = PARTS.values() if part == "all" else [PARTS[part]]
    blocks = [block for blocks_of in chosen for block in blocks_of(report)]
    return "\n\n".join(blocks) + "\n"


def _comparison(report: Report) -> list[str]:
    said = escape(key(report)).replace("Marked are", "**Better** and *worse* are")
    table = comparison_table(report)
    # Without headings between the rows: a README has few lines, and the names say as much.
    rows = replace(table, lines=[line for line in table.lines if line.kind != "group"])
    blocks = [escape(summary(report)), table_text(rows), said]
    blocks.append("\n".join(f"- {escape(name)}: {escape(note)}" for name, note in notes(report)))
    return [block for block in blocks if block]


def _sweep(report: Report) -> list[str]:
    return [f"{escape(title)}:\n\n{table_text(table)}" for title, table in sweep_tables(report)]


def _positions(report: Report) -> list[str]:
    found = position_table(report)
    if found is None:
        return []
    mark = "; \\* lies past the trained length" if any(found.past_training) else ""
    title = f"Perplexity by position, in blocks of {found.block:,} tokens{mark}:"
    return [title, table_text(found.table())]


def _claims(report: Report) -> list[str]:
    return [table_text(claims_table(report))] if report.claims else []


PARTS: dict[str, Callable[[Report], list[str]]] = {
    "comparison": _comparison,
    "sweep": _sweep,
    "positions": _positions,
    "claims": _claims,
}


def evaluation_text(report: evaluation.Evaluation, context: int | None = None) -> str:
    """What was evaluated and its tables, of one length or of all; ends with a newline."""
    known = list(dict.fromkeys(result.context for result in report.results))
    chosen = known if context is None else [context]
    tables = [table_text(evaluation.score_table(report, each)) for each in chosen]
    return "\n\n".join([escape(evaluation.summary(report)), *tables, escape(evaluation.KEY)]) + "\n"


def table_text(table: Table) -> str:
    """The lines of a table, without a newline at the end."""
    headings = [escape(table.corner), *(escape(str(heading)) for heading in table.headings)]
    rule = ["---", *("---:" if heading.right else "---" for heading in table.headings)]
    return "\n".join([_joined(headings), _joined(rule), *(_line(x, table) for x in table.lines)])


def _line(line: Line, table: Table) -> str:
    if line.kind == "group":
        return _joined([f"**{escape(line.name)}**", *[""] * len(table.headings)])
    if line.spans:
        rest = [""] * (len(table.headings) - 1)
        return _joined([escape(line.name), *(_cell(cell, table) for cell in line.cells[:1]), *rest])
    return _joined([escape(line.name), *(_cell(cell, table) for cell in line.cells)])


def _cell(cell: Cell | Sequence[Cell], table: Table) -> str:
    if not isinstance(cell, Cell):
        return "<br>".join(_cell(part, table) for part in cell)
    text = escape(str(cell))
    if table.marks_best and cell.better:
        return f"**{text}**"
    return f"*{text}*" if table.marks_worse and cell.better is False else text


def _joined(parts: Sequence[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def escape(text: str) -> str:
    """Text that is never read as markup, on one line."""
    return text.translate(_SPECIAL)
