"""The comparison as GitHub-flavoured Markdown."""

from __future__ import annotations

from saccade.report.positions import PositionTable, as_perplexity, position_table
from saccade.report.record import Report
from saccade.report.table import COLUMNS, cells, groups, heading, label, notes, summary

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~$"} | {"\n": " ", "\r": " "})


def to_markdown(report: Report) -> str:
    """Summary, table, perplexity by position and notes; ends with a newline."""
    parts = [_escape(summary(report)), _comparison(report)]
    found = position_table(report)
    if found is not None:
        parts += [_position_title(found), _by_position(found)]
    if lines := notes(report):
        parts.append("\n".join(f"- {_escape(name)}: {_escape(note)}" for name, note in lines))
    return "\n\n".join(parts) + "\n"


def _comparison(report: Report) -> str:
    baseline = report.baseline_row()
    lines = [_line(["", *(heading(column) for column in COLUMNS)]), _rule(len(COLUMNS))]
    for name, rows in groups(report):
        lines.append(_line([f"**{_escape(name)}**", *[""] * len(COLUMNS)]))
        for row in rows:
            shown = [_escape(str(cell)) for cell in cells(row, baseline)]
            lines.append(_line([_escape(label(row, report)), *shown]))
    return "\n".join(lines)


def _position_title(found: PositionTable) -> str:
    mark = "; \\* lies past the trained length" if any(found.past_training) else ""
    return f"Perplexity by position, in blocks of {found.block:,} tokens{mark}:"


def _by_position(found: PositionTable) -> str:
    lines = [_line(["from token", *map(_escape, found.headings())]), _rule(len(found.starts))]
    for name, values in found.lines:
        shown = []
        for column, value in enumerate(values):
            text = as_perplexity(value)
            shown.append(f"**{text}**" if found.verdict(column, value) else text)
        lines.append(_line([_escape(name), *shown]))
    return "\n".join(lines)


def _line(parts: list[str]) -> str:
    return "| " + " | ".join(parts) + " |"


def _rule(columns: int) -> str:
    return _line(["---", *["---:"] * columns])


def _escape(text: str) -> str:
    return text.translate(_SPECIAL)
