"""The columns of a comparison, defined once for every rendering.

A cell carries its value and, where that makes sense, the ratio to the baseline's value, so that
"212 MiB (0.35x)" reads the same in a terminal, in Markdown and on a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saccade.report.comparison import Report, Row
from saccade.report.numbers import (
    MISSING,
    as_bytes,
    as_duration,
    as_fact,
    as_ratio,
    as_share,
    significant,
    with_error,
)
from saccade.report.table import Cell, Heading, Line, Table

NOTEWORTHY = 0.05  # a ratio within 5 % of 1 is not called better or worse


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One measured quantity.

    Attributes:
        key: the field of `Row` it shows.
        title: its heading; unit: what the numbers count, "" where the cell says it.
        lower_is_better: the direction of a gain.
        compared: whether the ratio to the baseline says something.
        show: the text of a row and its value, called only where there is a value.
        meaning: how to read it; measured: how it was obtained.
    """

    key: str
    title: str
    unit: str = ""
    lower_is_better: bool
    compared: bool = True
    show: Callable[[Row, float], str]
    meaning: str
    measured: str

    def value(self, row: Row) -> float | None:
        """The number behind the cell, None where there is none to show."""
        value = getattr(row, self.key)
        return value if value is not None and math.isfinite(value) else None

    def ratio(self, row: Row, baseline: Row | None) -> float | None:
        """Value over the baseline's, None where one of them is missing or zero."""
        if not self.compared or baseline is None or row is baseline:
            return None
        value, reference = self.value(row), self.value(baseline)
        return value / reference if value is not None and reference else None

    def cell(self, row: Row, baseline: Row | None) -> Cell:
        """The cell of a row."""
        value, ratio = self.value(row), self.ratio(row, baseline)
        if value is None:
            return Cell(MISSING)
        if ratio is None:
            return Cell(self.show(row, value))
        better = None if abs(ratio - 1) < NOTEWORTHY else (ratio < 1) == self.lower_is_better
        return Cell(self.show(row, value), as_ratio(ratio), better)


COLUMNS = (
    Column(
        key="peak_bytes",
        title="Peak memory",
        lower_is_better=True,
        show=lambda row, value: as_bytes(value),
        meaning="The most memory in use above the loaded model while the context was read. "
        "Less is better.",
        measured="High-water mark of resident memory while the model reads the context, above "
        "what was in use before (the weights).",
    ),
    Column(
        key="cache_bytes",
        title="Cache",
        lower_is_better=True,
        show=lambda row, value: as_bytes(value),
        meaning="What the key/value caches hold once the context is read. Less is better.",
        measured="Bytes allocated by the caches of all layers, spare slots included.",
    ),
    Column(
        key="prefill_tps",
        title="Prefill",
        unit="tokens/s",
        lower_is_better=False,
        show=lambda row, value: significant(value),
        meaning="Speed of reading the context. More is better.",
        measured="Tokens of the context over the wall time of reading them, choosing what to "
        "keep included.",
    ),
    Column(
        key="decode_tps",
        title="Decode",
        unit="tokens/s",
        lower_is_better=False,
        show=lambda row, value: significant(value),
        meaning="Speed of writing an answer behind the whole context. More is better.",
        measured="Tokens of the answers to the needle questions over the wall time of writing "
        "them one by one.",
    ),
    Column(
        key="perplexity",
        title="Perplexity",
        lower_is_better=True,
        show=lambda row, value: with_error(value, row.perplexity_se, most_decimals=2),
        meaning="How surprised the model is by the real text: exp of the mean loss. "
        "Less is better; ± is one standard error.",
        measured="Over the scored tokens that continue the context, the same for every row.",
    ),
    Column(
        key="kl",
        title="KL",
        unit="nats",
        lower_is_better=True,
        compared=False,
        show=lambda row, value: with_error(value, row.kl_se, most_decimals=5),
        meaning="How far the next-token distribution is from the baseline's. "
        "0 is identical; ± is one standard error.",
        measured="Mean KL divergence, baseline to row, over the scored tokens.",
    ),
    Column(
        key="same_top",
        title="Same top",
        lower_is_better=False,
        compared=False,
        show=lambda row, value: as_share(value),
        meaning="How often the most likely next token is the one the baseline prefers. "
        "More is better.",
        measured="Share of the scored tokens.",
    ),
    Column(
        key="needle",
        title="Needle",
        lower_is_better=False,
        compared=False,
        show=lambda row, value: (
            f"{round(value * row.needle_trials)}/{row.needle_trials}"
            if row.needle_trials
            else as_share(value)
        ),
        meaning="Facts hidden in the context that the model could repeat. More is better.",
        measured="Sentences spread evenly through the context; the model completes each one "
        "when it is asked; found / asked.",
    ),
)

COST, QUALITY = COLUMNS[:4], COLUMNS[4:]


def groups(report: Report) -> list[tuple[str, list[Row]]]:
    """Rows under their headings, both in the order in which they were first measured."""
    headings: dict[str, list[Row]] = {}
    for row in report.rows:
        headings.setdefault(row.group, []).append(row)
    return list(headings.items())


def cells(row: Row, baseline: Row | None, columns: Sequence[Column] = COLUMNS) -> list[Cell]:
    """One cell for each of the columns; a row that did not run says so in the first."""
    line = [column.cell(row, baseline) for column in columns]
    if row.status != "ok" and line[0].text == MISSING:
        line[0] = Cell(row.status, better=False)
    return line


def comparison_table(report: Report, columns: Sequence[Column] = COLUMNS) -> Table:
    """The rows under their headings."""
    baseline = report.baseline_row()
    lines: list[Line] = []
    for name, rows in groups(report):
        lines.append(Line(name, kind="group"))
        for row in rows:
            kind, note = "base" if row.name == report.baseline else "row", as_fact("", row.options)
            lines.append(Line(label(row, report), cells(row, baseline, columns), kind, note))
    return Table([Heading(column.title, column.unit) for column in columns], lines)


def label(row: Row, report: Report) -> str:
    """The name of a row, the baseline marked."""
    return f"{row.name} (baseline)" if row.name == report.baseline else row.name


def notes(report: Report) -> list[tuple[str, str]]:
    """(name, note) of the rows and curves that have something to say, repetitions dropped."""
    said = [(row.name, _row_note(row)) for row in report.rows]
    said += [(curve.name, curve.note) for curve in report.curves]
    return list(dict.fromkeys(pair for pair in said if pair[1]))


def _row_note(row: Row) -> str:
    if row.status == "ok" or row.note.lower().startswith(row.status):
        return row.note
    return f"{row.status}: {row.note}" if row.note else row.status


def summary(report: Report) -> str:
    """One sentence that says what was run: model, text, context, machine, time."""
    model = report.model.get("name", "a model")
    text = report.text.get("source", "a text")
    tokens = report.settings.get("n_context")
    context = f", {tokens:,} tokens of context" if isinstance(tokens, int) else ""
    machine = report.environment.get("cpu", "an unknown machine")
    threads = report.environment.get("threads")
    where = f"{machine}, {threads} threads" if threads else str(machine)
    cut = "" if report.complete else "; stopped before the end"
    return f"{model} on {text}{context}; {where}; {as_duration(report.seconds)}{cut}"
