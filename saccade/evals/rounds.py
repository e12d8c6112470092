"""The rows of one run: measured in turns, each with its own fate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import torch

from saccade.core import Unsupported
from saccade.core.hardware import free_memory
from saccade.evals.applies import inapplicable
from saccade.evals.gpu_failure import end_if_failed, wait
from saccade.evals.judge import Judge
from saccade.evals.measure import Trial, measure, measure_speed
from saccade.evals.rows import FLASH, SDPA, TEXTBOOK, RowSpec
from saccade.evals.speed import Rounds, fill_speeds
from saccade.report.comparison import Report, Row
from saccade.units import as_bytes

_WARM_UP = 64
_LONGEST = 300  # characters of an error in a table
_OWN = ("name", "group", "options", "status", "note", "parts")


class Table:
    """Measures rows into a report.

    Args:
        exact: name of the row whose predictions the others should reproduce.
    """

    def __init__(self, report: Report, trial: Trial, exact: str) -> None:
        self._report, self._trial = report, trial
        self._judge = Judge(exact, trial.model.facts.dtype)
        self._rounds: dict[str, tuple[Row, Rounds]] = {}
        self._copies: list[tuple[Row, str]] = []

    def warm_up(self) -> None:
        """Read a little untimed: cold pages and starting threads would slow the first row."""
        with torch.inference_mode():
            tokens = self._trial.context[None, :_WARM_UP].to(self._trial.model.device)
            self._trial.model.model(tokens, use_cache=False)

    def first(self, spec: RowSpec, *, late: bool = False) -> None:
        """Memory, quality and the first times of a row; whatever goes wrong, its row says so.

        Args:
            late: whether there is no time left for it.

        Raises:
            GPUFailed: nothing more can be measured.
        """
        row = self._row(spec)
        why = inapplicable(spec, self._trial.model.facts, len(self._trial.context))
        why = why or self._too_large(spec)
        if why is not None:
            row.status, row.note = "not applicable", why
        elif late:
            row.status, row.note = "stopped", "there was no time left for it"
        elif spec.same_as is not None:
            self._copies.append((row, spec.same_as))
        else:
            self._measure(spec, row)

    def _row(self, spec: RowSpec) -> Row:
        row = Row(
            name=spec.name, group=spec.group, options=spec.options(), note=spec.note,
            parts=list(spec.parts),
        )  # fmt: skip
        self._report.rows.append(row)
        return row

    def stop(self, specs: Iterable[RowSpec], why: str) -> None:
        """Put those of these rows into the report that were not begun, and why they never are."""
        begun = {row.name for row in self._report.rows}
        for spec in specs:
            if spec.name not in begun:
                row = self._row(spec)
                row.status, row.note = "stopped", why

    def _measure(self, spec: RowSpec, row: Row) -> None:
        rounds, device = Rounds(), self._trial.model.device
        try:
            seen = measure(spec, self._trial, row, rounds)
            wait(device)
        except KeyboardInterrupt:
            _empty(row, "stopped", "stopped before it was measured")
            raise
        except Exception as error:  # any model's own code runs here; finished rows stay
            _empty(row, "failed", sentence(error))
            end_if_failed(device, error)
            return
        self._rounds[row.name] = row, rounds
        if seen is not None:
            self._judge.add(row, seen)
        self._fill()

    def again(self, spec: RowSpec) -> None:
        """One round more of a row that was measured.

        Raises:
            GPUFailed: nothing more can be measured.
        """
        if spec.name not in self._rounds or spec.heads == "mqa":
            return  # converting takes longer than what would be measured
        try:
            measure_speed(spec, self._trial, self._rounds[spec.name][1])
        except Exception as error:  # what it did before counts
            row = self._rounds[spec.name][0]
            row.note = f"{row.note}; measured once, then: {sentence(error)}".lstrip("; ")
            end_if_failed(self._trial.model.device, error)

    def finish(self) -> None:
        """What needs all rows."""
        ok = {row.name for row in self._report.rows if row.status == "ok"}
        preferred = (SDPA, TEXTBOOK, FLASH)
        self._judge.settle()
        if self._judge.exact == TEXTBOOK:
            preferred = (TEXTBOOK,)
        self._report.reference = next((name for name in preferred if name in ok), SDPA)
        self._judge.finish(self._report.reference)
        self._report.settings["divergence_from"] = self._judge.exact
        self._fill()

    def _fill(self) -> None:
        fill_speeds(self._rounds.values(), len(self._trial.context))
        for copy, name in self._copies:
            self._copy(copy, name)

    def _copy(self, row: Row, name: str) -> None:
        """A row that does the same as another one, with its numbers."""
        source = self._report.row(name)
        if source is None:
            row.status, row.note = "failed", f"it is measured as {name}, which was not"
            return
        for field in fields(Row):
            if field.name not in _OWN:
                setattr(row, field.name, getattr(source, field.name))
        row.note = f"the same run as {name}"

    def _too_large(self, spec: RowSpec) -> str | None:
        """Why the scores of eager attention do not fit: a float32 softmax and three copies."""
        if spec.theirs != "eager":
            return None
        facts, trial = self._trial.model.facts, self._trial
        scores = facts.num_heads * min(spec.params.n_batch, len(trial.context)) * trial.total
        needed, free = scores * (4 + 3 * facts.dtype.itemsize), free_memory(trial.model.device)
        if needed < 0.8 * free:
            return None
        return f"its scores need about {as_bytes(needed)}, {as_bytes(free)} are free"


def sentence(error: Exception) -> str:
    """What a row says of an error: ours are sentences, others are named by their type."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return "there is not enough memory for it"
    if isinstance(error, Unsupported | ValueError) and text:
        return text if len(text) < _LONGEST else text[:_LONGEST].rpartition(". ")[0] or text
    return f"{type(error).__name__}: {text or 'no reason given'}"[:_LONGEST]


def _empty(row: Row, status: str, note: str) -> None:
    """Take back what was filled in of a row that did not finish."""
    for field in fields(Row):
        if field.name not in _OWN:
            setattr(row, field.name, 0 if field.name == "needle_trials" else None)
    row.status, row.note = status, note
