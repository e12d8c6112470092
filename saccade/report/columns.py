"""The columns of a comparison, defined once for every rendering.

A cell carries its value and, where that makes sense, the ratio to the baseline's value, so that
"212 MiB (0.35x)" reads the same in a terminal, in Markdown and on a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from saccade.report import verdict
from saccade.report.comparison import Report, Row, SweepPoint
from saccade.report.numbers import (
    MISSING,
    as_bytes,
    as_ratio,
    as_seconds,
    as_share,
    significant,
    with_error,
)
from saccade.report.table import Cell, Heading, Line, Table

LONGEST = 60  # letters of a reason that a cell can show; the notes have all of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One measured quantity.

    Attributes:
        key: the field of `Row` it shows.
        title: its heading; unit: what the numbers count, "" where the cell says it.
        lower_is_better: the direction of a gain.
        compared: whether ratios to other rows say something.
        error: how certain the ratio to the reference is; None where it is not judged by ratio.
        multiplies: whether a combination of rows is expected to give the product of their ratios.
        optional: whether tables leave it out where no row has a value, as older records have none.
        show: the text of a row and its value, called only where there is a value.
        meaning: how to read it; measured: how it was obtained.
    """

    key: str
    title: str
    unit: str = ""
    lower_is_better: bool
    compared: bool = True
    error: verdict.Error | None = None
    multiplies: bool = False
    optional: bool = False
    show: Callable[[Any, float], str]
    meaning: str
    measured: str

    def value(self, row: Any) -> float | None:
        """The number behind the cell, None where there is none to show."""
        return verdict.finite(row, self.key)

    def ratio(self, row: Any, other: Any) -> float | None:
        """Value over the other row's, None where one of them is missing or zero."""
        return verdict.ratio(row, other, self.key) if self.compared else None

    def better(self, row: Any, reference: Any) -> bool | None:
        """Whether a row is better than the reference, None within the interval or unknown."""
        if reference is None or row is reference:
            return None
        if self.key == "needle":
            return verdict.of_shares(row, reference, self.key, "needle_trials")
        if self.error is None:
            return None
        error = self.error(row, reference)
        found = self.ratio(row, reference)
        return verdict.of_ratio(found, error, lower_is_better=self.lower_is_better)

    def cell(self, row: Row, report: Report) -> Cell:
        """The cell of a row: value, ratio to the baseline and to the reference, verdict."""
        value, reference = self.value(row), report.reference_row()
        if value is None:
            return Cell(MISSING)
        better = self.better(row, reference)
        if row is not reference and verdict.is_broken(row, reference):
            better = False if self in QUALITY else (better and None)
        expected = expectation(self, row, report)
        said = "" if expected is None else as_ratio(expected)
        return Cell(self.show(row, value), self._ratios(row, report), better, said)

    def _ratios(self, row: Row, report: Report) -> str:
        """`4.33x, 1.06x`; a row is `1x` of itself, and what is missing of two is a dash."""
        others = list(dict.fromkeys(filter(None, (report.baseline, report.reference))))
        rows = [report.row(name) for name in others]
        if rows and rows[-1] is None:  # one that is not there yet is no second ratio
            rows.pop()
        ratios = [self.ratio(row, other) for other in rows]
        if all(ratio is None for ratio in ratios) or (len(rows) == 1 and row is rows[0]):
            return ""
        texts = [MISSING if ratio is None else as_ratio(ratio) for ratio in ratios]
        return ", ".join("1x" if row is o else t for o, t in zip(rows, texts, strict=True))


def expectation(column: Column, row: Row, report: Report) -> float | None:
    """Of a combination, the product of its parts' ratios to the baseline, None where one lacks."""
    if not column.multiplies or not row.parts:
        return None
    product, baseline = 1.0, report.baseline_row()
    for name in row.parts:
        ratio = column.ratio(report.row(name), baseline)
        if ratio is None:
            return None
        product *= ratio
    return product


COLUMNS = (
    Column(
        key="total_bytes",
        title="Memory",
        lower_is_better=True,
        error=verdict.exact,
        optional=True,
        show=lambda row, value: as_bytes(value),
        meaning="Weights and the peak of memory above them: what the run needs. Less is better.",
        measured="Bytes of the weights as they lie in memory, and the peak in the next column.",
    ),
    Column(
        key="peak_bytes",
        title="Peak memory",
        lower_is_better=True,
        error=verdict.exact,
        multiplies=True,
        show=lambda row, value: as_bytes(value),
        meaning="The most memory in use above the loaded model while the context was read. "
        "Less is better.",
        measured="The most bytes that the allocator had given out at one time while the model "
        "read the context; weights and loading are not in it.",
    ),
    Column(
        key="cache_bytes",
        title="Cache",
        lower_is_better=True,
        error=verdict.exact,
        multiplies=True,
        show=lambda row, value: as_bytes(value),
        meaning="What the key/value caches hold once the context is read. Less is better.",
        measured="Bytes allocated by the caches of all layers, spare slots included.",
    ),
    Column(
        key="ttft_seconds",
        title="First token",
        lower_is_better=True,
        error=verdict.waited,
        show=lambda row, value: as_seconds(value),
        meaning="Time until the first token of an answer. Less is better.",
        measured="Wall time of reading the whole context and choosing one token.",
    ),
    Column(
        key="prefill_tps",
        title="Prefill",
        unit="tokens/s",
        lower_is_better=False,
        error=verdict.sampled("prefill_tps"),
        multiplies=True,
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
        error=verdict.sampled("decode_tps"),
        multiplies=True,
        show=lambda row, value: significant(value),
        meaning="Speed of writing an answer behind the whole context. More is better.",
        measured="Tokens of answers over the wall time of writing them one by one.",
    ),
    Column(
        key="perplexity",
        title="Perplexity",
        lower_is_better=True,
        error=verdict.paired_perplexity,
        show=lambda row, value: with_error(
            value, verdict.finite(row, "perplexity_se"), most_decimals=2
        ),
        meaning="How surprised the model is by the real text: exp of the mean loss. "
        "Less is better; ± is one standard error.",
        measured="Over the scored tokens that continue the context, the same for every row; "
        "whether a ratio differs from 1 is judged from the differences token by token.",
    ),
    Column(
        key="kl",
        title="KL",
        unit="nats",
        lower_is_better=True,
        compared=False,
        show=lambda row, value: with_error(value, verdict.finite(row, "kl_se"), most_decimals=5),
        meaning="How far the next-token distribution is from the exact one. "
        "0 is identical; ± is one standard error.",
        measured="Mean KL divergence over the scored tokens from the row that the settings name in "
        "divergence_from, else from the reference.",
    ),
    Column(
        key="same_top",
        title="Same top",
        lower_is_better=False,
        compared=False,
        show=lambda row, value: as_share(value),
        meaning="How often the most likely next token is the one of the exact row. More is better.",
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
        measured="Sentences hidden in the context; the model completes each one when it is "
        "asked; found / asked.",
    ),
)

COST, QUALITY = COLUMNS[:6], COLUMNS[6:]


def shown(columns: Sequence[Column], rows: Iterable[Any]) -> list[Column]:
    """The columns without optional ones that no row has a value for."""
    rows = list(rows)
    return [c for c in columns if not c.optional or any(c.value(row) is not None for row in rows)]


def groups(report: Report) -> list[tuple[str, list[Row]]]:
    """Rows under their headings, both in the order in which they were first measured."""
    headings: dict[str, list[Row]] = {}
    for row in report.rows:
        headings.setdefault(row.group, []).append(row)
    return list(headings.items())


def cells(row: Row, report: Report, columns: Sequence[Column] = COLUMNS) -> list[Cell]:
    """One cell for each of the columns; a row that did not run says why where numbers lack."""
    line = [column.cell(row, report) for column in columns]
    missing = [at for at, cell in enumerate(line) if cell.text == MISSING]
    if row.status != "ok" and missing:
        line[missing[0]] = Cell(why(row), better=None if row.status == "not applicable" else False)
    return line


def why(row: Row | SweepPoint, most: int = LONGEST) -> str:
    """The status of a row that did not run and its reason, cut after about `most` letters."""
    reason = row.note.strip().removeprefix(row.status).lstrip(" :,;")
    whole = f"{row.status}: {reason}" if reason else row.status
    if len(whole) <= most:
        return whole
    cut = whole[:most].rpartition(" ")[0] or whole[:most]
    return cut.rstrip(" ,;:.") + "…"


def comparison_table(report: Report, columns: Sequence[Column] = COLUMNS) -> Table:
    """The rows under their headings."""
    columns = shown(columns, report.rows)
    lines: list[Line] = []
    for name, rows in groups(report):
        lines.append(Line(name, kind="group"))
        lines += [_line(row, report, columns) for row in rows]
    headings = [Heading(column.title, column.unit) for column in columns]
    return Table(headings, lines, marks_best=True, marks_worse=True)


def _line(row: Row, report: Report, columns: Sequence[Column]) -> Line:
    kind = "base" if row.name in (report.baseline, report.reference) else "row"
    empty = row.status != "ok" and all(column.value(row) is None for column in COLUMNS)
    note = BROKEN if verdict.is_broken(row, report.reference_row()) else ""
    return Line(label(row, report), cells(row, report, columns), kind, note, spans=empty)


BROKEN = "quality broken"


def label(row: Row, report: Report) -> str:
    """The name of a row, the baseline and the reference marked."""
    marks = {report.baseline: "baseline", report.reference: "reference"}
    return f"{row.name} ({marks[row.name]})" if row.name in marks else row.name
