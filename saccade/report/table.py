"""A table before it is drawn: the terminal, Markdown and pages show the same one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: the value; ratio: what it is of others' values, "4.33x, 1.06x".
        better: None where it is neither good nor bad.
        expected: the ratio that was to be expected, "" where nothing is.
    """

    text: str
    ratio: str = ""
    better: bool | None = None
    expected: str = ""

    @property
    def aside(self) -> str:
        """What stands in brackets behind the value."""
        expected = f"expected {self.expected}" if self.expected else ""
        return "; ".join(part for part in (self.ratio, expected) if part)

    def __str__(self) -> str:
        return f"{self.text} ({self.aside})" if self.aside else self.text


@dataclass(frozen=True, slots=True)
class Heading:
    """The top of a column; `unit` is what its numbers count, "" where the cells say it."""

    title: str
    unit: str = ""
    right: bool = True

    def __str__(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


@dataclass(frozen=True, slots=True)
class Line:
    """A row.  A cell may be several, one below the other.

    Attributes:
        kind: "group" is the heading of the rows below it and has no cells, "base" is what others
            are compared with, "peer" is an implementation by others.
        note: what pages show in small letters below the name.
        spans: the first cell says why there are no others: where it can, it takes their room.
    """

    name: str
    cells: Sequence[Cell | Sequence[Cell]] = ()
    kind: Literal["row", "group", "base", "peer"] = "row"
    note: str = ""
    spans: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows.

    Attributes:
        corner: the heading of the names.
        marks_best: Markdown, which has no colours, shows cells that are better in bold;
            marks_worse: and those that are worse in italics.
    """

    headings: Sequence[Heading]
    lines: Sequence[Line]
    corner: str = ""
    marks_best: bool = False
    marks_worse: bool = False
