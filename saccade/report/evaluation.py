"""The record of an evaluation: for each task, length and set of options the scores of its samples.

Every score has an interval, and what a policy costs is measured on the same samples as the model
without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from saccade.report import record
from saccade.report.intervals import paired_difference, wilson
from saccade.report.numbers import as_position, as_ratio
from saccade.report.record import Record
from saccade.report.table import Cell, Heading, Line, Table

SCHEMA = "saccade.eval/1"
DENSE = "dense"
"""The row of the model as it is, which every other one is compared with."""
SOLVED = "mean of the tasks that dense solves"
_ASKED = {"": "", "before": ", question before", "after": ", question after"}


@dataclass(slots=True, kw_only=True)
class Score:
    """One task at one length under one set of options.

    Attributes:
        task, context: what was asked, at how many tokens of prompt and answer together.
        row: name of the options; asked: whether the question was read "before" or "after" the cache
            was compressed, "" for a row that compresses nothing.
        status: "ok", "gated" (the model without a policy does not solve the task), "does not fit",
            "failed", or "stopped".  Any but "ok" says why in `note`.
        scores: of each sample, 0 to 1; turns: the mean of each turn, where there are several.
        mean, low, high: of the scores, with bounds of 95 %; of what is finished, if "stopped".
        change, change_low, change_high: mean difference from the dense row on the same samples.
        cache_bytes: mean of the caches right after compression; seconds: mean of a sample.
    """

    task: str
    context: int
    row: str
    asked: str = ""
    status: str = "ok"
    note: str = ""
    scores: list[float] = field(default_factory=list[float])
    turns: list[float] = field(default_factory=list[float])
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    cache_bytes: float | None = None
    seconds: float | None = None

    @property
    def column(self) -> str:
        """The row and when it was asked, as a heading."""
        return self.row + _ASKED[self.asked]

    def fill(self, scores: Sequence[float], dense: Score | None) -> None:
        """Take in the scores of samples, the first of those that the dense row was scored on."""
        self.scores = list(scores)
        if not scores:
            return
        self.mean = fmean(scores)
        self.low, self.high = wilson(self.mean, len(scores))
        if dense is not None:
            found = paired_difference(self.scores, dense.scores[: len(scores)])
            self.change, self.change_low, self.change_high = found


@dataclass(slots=True, kw_only=True)
class Evaluation(Record):
    """One run of `saccade eval`.

    Attributes:
        model: facts as {name: value}.
        settings: samples, seed, gate, n_batch, template, essay, device; rows: options by name.
        results: in the order in which they were scored.
        seconds: wall time of this run; complete: False after Ctrl-C.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    results: list[Score] = field(default_factory=list[Score])
    seconds: float = 0.0
    complete: bool = True
    schema: str = SCHEMA

    def dense(self, task: str, context: int) -> Score | None:
        """The finished score of the model as it is."""
        return next(
            (r for r in self.results if (r.task, r.context, r.row) == (task, context, DENSE)
             and r.status == "ok"), None,
        )  # fmt: skip


def read(path: Path) -> Evaluation:
    """Read a record back.

    Raises:
        BadInput: not a record of this schema, or a field of the wrong kind.
    """
    return record.read(path, SCHEMA, _made)


def _made(data: dict[str, Any]) -> Evaluation:
    results = [record.made(Score, entry) for entry in data.pop("results")]
    return record.made(Evaluation, {**data, "results": results})


def summary(report: Evaluation) -> str:
    """What was evaluated, in one line."""
    settings, machine = report.settings, report.environment
    where = ", ".join(machine["gpu"]) if "cuda" in settings["device"] else machine["cpu"]
    stopped = "" if report.complete else "; stopped before the end"
    return (
        f"{report.model['name']}, {settings['samples']} samples each, seed {settings['seed']}; "
        f"{where}{stopped}"
    )


KEY = (
    "In brackets: the range that holds the true score with 95 % confidence (Wilson). Cache: bytes "
    "after compression as a multiple of the dense row's. A policy is scored where the model "
    "without one reaches the gate."
)


def score_table(report: Evaluation, context: int) -> Table:
    """The scores at one length: a row for each task, a column for each set of options."""
    found = [result for result in report.results if result.context == context]
    columns = list(dict.fromkeys(result.column for result in found))
    tasks = list(dict.fromkeys(result.task for result in found))
    by_place = {(result.task, result.column): result for result in found}
    lines = [Line(task, [_cell(by_place.get((task, at))) for at in columns]) for task in tasks]
    lines += _means(report, found, columns)
    return Table([Heading(at) for at in columns], lines, f"{as_position(context)} tokens")


def _cell(result: Score | None) -> Cell:
    if result is None:
        return Cell("–")
    if result.mean is None:
        return Cell(result.status)
    better = None
    if result.change_high is not None and result.change_low is not None:
        better = False if result.change_high < 0 else True if result.change_low > 0 else None
    return Cell(f"{100 * result.mean:.0f} %", bounds(result.low, result.high), better)


def bounds(low: float | None, high: float | None) -> str:
    """`62-94`, in per cent; outwards, so that rounding never narrows."""
    return f"{100 * (low or 0):.0f}-{100 * (high or 0):.0f}"


def _means(report: Evaluation, found: Sequence[Score], columns: Sequence[str]) -> list[Line]:
    """The mean of each column over the tasks that the dense row solves, and its caches."""
    gate = report.settings["gate"]
    dense = {r.task: r for r in found if r.row == DENSE and r.status == "ok"}
    solved = [task for task, r in dense.items() if r.mean is not None and r.mean >= gate]
    scores: list[Cell] = []
    sizes: list[Cell] = []
    for column in columns:
        mine = [r for r in found if r.column == column and r.status == "ok" and r.task in solved]
        whole = bool(solved) and len(mine) == len(solved)
        pooled = [score for r in mine for score in r.scores] if whole else []
        scores.append(_pooled(pooled))
        ratios = [
            r.cache_bytes / size
            for r in mine
            if r.cache_bytes is not None and (size := dense[r.task].cache_bytes)
        ]
        sizes.append(Cell(as_ratio(fmean(ratios)) if ratios else "–"))
    if len(dense) < 2:
        return [Line("cache", sizes)]
    return [Line(f"{SOLVED} ({len(solved)})", scores), Line("their cache", sizes)]


def _pooled(scores: Sequence[float]) -> Cell:
    """The mean over tasks with equally many samples, which vary less than samples of one."""
    if not scores:
        return Cell("–")
    mean = fmean(scores)
    return Cell(f"{100 * mean:.1f} %", bounds(*wilson(mean, len(scores))))


def notes(report: Evaluation) -> list[str]:
    """Why results are missing, each reason once."""
    return list(dict.fromkeys(result.note for result in report.results if result.note))
