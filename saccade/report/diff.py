"""Two records of the same comparison side by side: what became better, and whether that is fair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from saccade.report import verdict
from saccade.report.columns import COLUMNS, Column, shown, why
from saccade.report.comparison import Report, Row, SweepPoint
from saccade.report.numbers import MISSING, as_fact, as_ratio, fact_name
from saccade.report.table import Cell, Heading, Line, Table

SCHEMA = "saccade.report-diff/1"
SAME = 1e-3  # references whose perplexities agree so far read the same text with the same model
EXPECTED = ("saccade",)  # facts of the environment that two records are compared for

Measured = Row | SweepPoint


@dataclass(frozen=True, slots=True)
class Change:
    """One quantity of one row: its values in both records, new over old, and the verdict.

    Attributes:
        better: True or False beyond the interval and 5 %, None within it or where it is not known.
    """

    old: float | None
    new: float | None
    ratio: float | None
    better: bool | None


@dataclass(frozen=True, slots=True)
class RowChange:
    """A row of both records, with a `Change` for each column."""

    name: str
    old: Measured
    new: Measured
    changes: dict[str, Change]


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two records.

    Attributes:
        unfair: sentences about what else differs: model, text, settings, machine.
        rows: those of both records, in the order of the new one; old_only, new_only: names.
    """

    old: Report
    new: Report
    unfair: list[str]
    rows: list[RowChange]
    old_only: list[str] = field(default_factory=list)
    new_only: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The difference as values of JSON."""
        return {
            "schema": SCHEMA,
            "old": _origin(self.old),
            "new": _origin(self.new),
            "unfair": self.unfair,
            "rows": [_row_dict(row) for row in self.rows],
            "old_only": self.old_only,
            "new_only": self.new_only,
        }


def difference(old: Report, new: Report) -> Difference:
    """Compare two records row by row, the points of their sweeps included."""
    before, after = _measured(old), _measured(new)
    errors = _perplexity_error(old, new)
    rows = [
        RowChange(name, before[name], row, _changes(before[name], row, errors))
        for name, row in after.items()
        if name in before
    ]
    return Difference(
        old, new, unfair(old, new), rows,
        [name for name in before if name not in after],
        [name for name in after if name not in before],
    )  # fmt: skip


def _origin(report: Report) -> dict[str, Any]:
    return {"revision": report.revision, "date": report.date, "command": report.command}


def _row_dict(row: RowChange) -> dict[str, Any]:
    columns = {
        key: {"old": c.old, "new": c.new, "ratio": c.ratio, "better": c.better}
        for key, c in row.changes.items()
        if not (c.old is None and c.new is None)
    }
    return {"name": row.name, "old_status": row.old.status, "new_status": row.new.status,
            "columns": columns}  # fmt: skip


def _measured(report: Report) -> dict[str, Measured]:
    rows: dict[str, Measured] = {row.name: row for row in report.rows}
    points = {f"{at.name}, {at.n_context:,} tokens": at for at in report.sweep}
    return {**rows, **points}


def unfair(old: Report, new: Report) -> list[str]:
    """What else than the code differs between two runs, a sentence each."""
    said = [
        f"{title}: {fact_name(name)} was {as_fact(name, a)} and is {as_fact(name, b)}."
        for title, key in (("Machine", "environment"), ("Model", "model"), ("Text", "text"),
                           ("Settings", "settings"))
        for name, a, b in _unequal(getattr(old, key), getattr(new, key))
        if not (key == "environment" and name in EXPECTED)
    ]  # fmt: skip
    for name in ("baseline", "reference"):
        a, b = getattr(old, name), getattr(new, name)
        if a != b:
            said.append(f"Rows: the {name} was {a or MISSING} and is {b or MISSING}.")
    before = {row.name: row for row in old.rows}
    for row in new.rows:
        if row.name in before and before[row.name].options != row.options:
            pairs = _unequal(before[row.name].options, row.options)
            listed = ", ".join(f"{n} {as_fact(n, a)} to {as_fact(n, b)}" for n, a, b in pairs)
            said.append(f"Rows: {row.name} was run with other options ({listed}).")
    return said


def _unequal(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys((*old, *new))
    return [(n, old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n)]


def _changes(old: Measured, new: Measured, perplexity: verdict.Error) -> dict[str, Change]:
    return {column.key: _change(column, old, new, perplexity) for column in COLUMNS}


def _change(column: Column, old: Measured, new: Measured, perplexity: verdict.Error) -> Change:
    before, after = column.value(old), column.value(new)
    ratio = verdict.ratio(new, old, column.key)
    if column.key == "kl":
        return Change(before, after, ratio, _closer(old, new))
    if column.key == "needle":
        better = verdict.of_shares(new, old, column.key, "needle_trials")
        return Change(before, after, ratio, better)
    if column.error is None:
        return Change(before, after, ratio, None)
    error = (perplexity if column.key == "perplexity" else column.error)(new, old)
    better = verdict.of_ratio(ratio, error, lower_is_better=column.lower_is_better)
    return Change(before, after, ratio, better)


def _closer(old: Measured, new: Measured) -> bool | None:
    """Whether the predictions came nearer to the reference's, beyond both errors and 5 %."""
    values = [verdict.finite(row, "kl") for row in (old, new)]
    errors = [verdict.finite(row, "kl_se") for row in (old, new)]
    if None in values or None in errors:
        return None
    (a, b), (x, y) = values, errors  # type: ignore[misc]
    beyond = verdict.ERRORS * math.hypot(x or 0.0, y or 0.0)
    difference = (b or 0.0) - (a or 0.0)
    if abs(difference) <= max(beyond, verdict.NOTEWORTHY * (a or 0.0)):
        return None
    return difference < 0


def _perplexity_error(old: Report, new: Report) -> verdict.Error:
    """From the pairs with either reference, where both references read the same text alike."""
    a, b = old.reference_row(), new.reference_row()
    found = verdict.ratio(b, a, "perplexity") if a is not None and b is not None else None
    if found is None or abs(found - 1) > SAME:
        return verdict.sampled("perplexity")

    def error(row: Any, before: Any) -> float | None:
        shares = [verdict.paired_perplexity(before, a), verdict.paired_perplexity(row, b)]
        known = [share for share in shares if share is not None]
        return math.hypot(*known) if len(known) == len(shares) else None

    return error


def difference_table(found: Difference, columns: Sequence[Column] = COLUMNS) -> Table:
    """A line for each row of both records: old -> new (ratio)."""
    columns = shown(columns, (each for row in found.rows for each in (row.old, row.new)))
    lines = [
        Line(row.name, [_cell(column, row) for column in columns])
        for row in found.rows
    ]  # fmt: skip
    return Table([Heading(column.title, column.unit) for column in columns], lines)


def _cell(column: Column, row: RowChange) -> Cell:
    change = row.changes[column.key]
    texts = [
        MISSING if value is None else column.show(each, value)
        for each, value in ((row.old, change.old), (row.new, change.new))
    ]
    if change.old is None and change.new is None:
        return Cell(MISSING)
    if texts[0] == texts[1]:
        return Cell(texts[0])
    ratio = as_ratio(change.ratio) if column.compared and change.ratio is not None else ""
    word = {True: "better", False: "worse", None: ""}[change.better]
    return Cell(" → ".join(texts), " ".join(filter(None, (ratio, word))), change.better)


def status_changes(found: Difference) -> list[str]:
    """Rows that did not run in one of the records or in both, and why."""
    return [
        f"{row.name}: {' → '.join(dict.fromkeys((_status(row.old), _status(row.new))))}"
        for row in found.rows
        if (row.old.status, row.new.status) != ("ok", "ok")
    ]


def _status(row: Measured) -> str:
    return "measured" if row.status == "ok" else why(row, 200)
