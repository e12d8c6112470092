"""The figures behind the rules of a CPU as a table: one row a size, the faster backend in green."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from saccade.report.numbers import MISSING, as_time
from saccade.report.table import Cell, Heading, Line, Table

COLUMNS = ("saccade", "PyTorch's SDPA", "auto takes", "speed over the other")


def as_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows as a record holds them; kinds of calls are the headings between them."""
    lines: list[Line] = []
    for row in rows:
        if not lines or all(line.name != row["case"] for line in lines if line.kind == "group"):
            lines.append(Line(str(row["case"]), (), "group"))
        lines.append(Line(_title(row), _cells(row)))
    headings = [Heading(name) for name in COLUMNS]
    return Table(headings, lines, "call")


def _title(row: Mapping[str, Any]) -> str:
    """`bfloat16, 9/3 D64, 2048 queries and keys`."""
    sizes = f"{row['queries']} queries, {row['keys']} keys"
    if row["queries"] == row["keys"]:
        sizes = f"{row['keys']} queries and keys"
    elif row["queries"] == 1:
        sizes = f"{row['keys']} keys"
    return f"{row['dtype']}, {row['heads']}/{row['kv_heads']} D{row['head_dim']}, {sizes}"


def _cells(row: Mapping[str, Any]) -> list[Cell]:
    ms: Mapping[str, float] = row["ms"]
    winner = row.get("winner")
    cells = [
        Cell(as_time(ms[name] / 1e3), better=True if name == winner else None)
        if name in ms
        else Cell(row.get("cannot", {}).get(name, MISSING))
        for name in ("cpu", "sdpa")
    ]
    if winner is None:
        return [*cells, Cell(MISSING), Cell(MISSING)]
    other = "sdpa" if winner == "cpu" else "cpu"
    return [*cells, Cell(winner), Cell(f"{ms[other] / ms[winner]:.2f}x")]
