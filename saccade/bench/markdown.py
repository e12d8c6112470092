"""The benchmark as GitHub-flavoured Markdown, for the docs."""

from __future__ import annotations

from itertools import groupby

from saccade.bench.record import Record
from saccade.bench.table import COLUMNS, as_bar, cells, closing, heading, title

_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~$"} | {"\n": " ", "\r": " "})


def to_markdown(record: Record) -> str:
    """Machine, ceilings, table and notes; ends with a newline."""
    notes = [
        f"- {row.status}: {row.case}, {title(row)}: {_escape(row.note)}"
        for row in record.rows
        if row.status != "ok"
    ]
    above = "  \n".join(map(_escape, heading(record)))
    below = "  \n".join(map(_escape, closing(record)))
    parts = [above, _table(record), *(["\n".join(notes)] if notes else []), below]
    return "\n\n".join(parts) + "\n"


def _table(record: Record) -> str:
    lines = [_line(["", *COLUMNS]), "|---|" + "---:|" * (len(COLUMNS) - 1) + "---|"]
    for group, rows in groupby(record.rows, key=lambda row: row.group):
        lines.append(_line([f"**{_escape(group)}**", *[""] * len(COLUMNS)]))
        for row in rows:
            shown = [_escape(text) for text in cells(row, record)]
            bars = "<br>".join(_escape(as_bar(bar)) for bar in row.bars)
            lines.append(_line([_escape(f"{row.label}, {title(row)}"), *shown, bars]))
    return "\n".join(lines)


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escape(text: str) -> str:
    return text.translate(_SPECIAL)
