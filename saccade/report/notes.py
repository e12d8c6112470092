"""What a comparison says in words: what was run, how to read it, what rows have to say."""

from __future__ import annotations

from typing import Any

from saccade.report import verdict
from saccade.report.columns import COLUMNS, expectation
from saccade.report.comparison import Report, Row
from saccade.report.numbers import as_bytes, as_duration


def summary(report: Report) -> str:
    """One sentence that says what was run: model, text, context, machine, time."""
    model = report.model.get("name", "a model")
    text = report.text.get("source", "a text")
    tokens = report.settings.get("n_context")
    context = f", {tokens:,} tokens of context" if isinstance(tokens, int) else ""
    cut = "" if report.complete else "; stopped before the end"
    run = f"{model}{_weights(report)} on {text}{context}"
    return f"{run}; {_machine(report)}; {as_duration(report.seconds)}{cut}"


def _weights(report: Report) -> str:
    """What the weights are, and their bytes, where the record says so."""
    kind, size = report.model.get("weights"), report.model.get("weight_bytes")
    return f" ({kind}, {as_bytes(size)} of weights)" if kind and size else ""


def _machine(report: Report) -> str:
    """The GPU where one was used, else the CPU and its threads."""
    gpu, device = report.environment.get("gpu"), str(report.settings.get("device", "cpu"))
    if gpu and device.startswith("cuda"):
        return str(gpu if isinstance(gpu, str) else gpu[0])
    machine = report.environment.get("cpu", "an unknown machine")
    threads = report.environment.get("threads")
    if not threads:
        return str(machine)
    return f"{machine}, {threads} thread{'' if threads == 1 else 's'}"


def key(report: Report, *, place: str = "In brackets") -> str:
    """How to read the ratios, which stand at `place`, what is marked, and what KL compares with."""
    if not any(row.status == "ok" for row in report.rows):
        return ""
    if report.reference_row() is None:
        if report.baseline_row() is None:
            return "Nothing is compared: the rows that others are compared with were not measured."
        reason = f"{report.reference} was not measured" if report.reference else "no reference"
        return f"{place}: ratio to {report.baseline}. Nothing is marked as better: {reason}."
    said = (
        f"{place}: ratios to {report.baseline} (the textbook) and to {report.reference} "
        "(what transformers does by itself). Marked are differences from the latter of more than "
        f"{verdict.NOTEWORTHY:.0%} and {verdict.ERRORS:g} standard errors".replace("%", " %")
    )
    if any(_expects(row, report) for row in report.rows):
        said += '; "expected" is the product of the ratios of the rows that are combined'
    if exact := report.settings.get("divergence_from"):
        said += f". KL and Same top compare with the predictions of {exact}"
    return said + "."


def _expects(row: Row, report: Report) -> bool:
    return any(expectation(column, row, report) is not None for column in COLUMNS)


def notes(report: Report) -> list[tuple[str, str]]:
    """(names, note) of the rows, curves and points that have the same thing to say."""
    said = [(row.name, _row_note(row)) for row in report.rows]
    said += [(row.name, _broken(row, report)) for row in report.rows]
    said += [(curve.name, curve.note) for curve in report.curves]
    said += [(f"{at.name} at {at.n_context:,} tokens", _row_note(at)) for at in report.sweep]
    names: dict[str, list[str]] = {}
    for name, note in dict.fromkeys(said):
        names.setdefault(note, []).append(name)
    return [(", ".join(of), note) for note, of in names.items() if note]


def _row_note(row: Any) -> str:
    if row.status == "ok" or row.note.lower().startswith(row.status):
        return row.note
    return f"{row.status}: {row.note}" if row.note else row.status


def _broken(row: Row, report: Report) -> str:
    if not verdict.is_broken(row, report.reference_row()):
        return ""
    return (
        f"its quality is broken (perplexity over {verdict.BROKEN_PERPLEXITY:g} times the "
        f"reference's, or KL over {verdict.BROKEN_KL:g} nat), so what it saves is not called better"
    )
