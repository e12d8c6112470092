"""The record of a comparison: a row for each technique, curves of perplexity by position.

None means "not measured"; a row that could not run says why in `note`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.report import record
from saccade.report.record import Record

SCHEMA = "saccade.compare/1"


@dataclass(slots=True, kw_only=True)
class Row:
    """One configuration and what it cost and gave.

    Attributes:
        name: what a person calls it; group: the heading it stands under.
        options: the ContextParams that were not default, and what else makes the row.
        status: "ok", "failed", or "stopped" (Ctrl-C).
        peak_bytes: most memory in use above the loaded model while the context was read.
        cache_bytes: bytes allocated by the caches after the context was read.
        prefill_tps, decode_tps: tokens a second reading the context and writing an answer.
        perplexity, perplexity_se: of the scored tokens, with its standard error.
        kl, kl_se: mean KL divergence (nats) of the next-token distribution from the baseline's.
        same_top: share of scored tokens with the same most likely next token as the baseline.
        needle: share of the hidden facts found; needle_trials: how many were asked for.
    """

    name: str
    group: str
    options: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    note: str = ""
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    perplexity: float | None = None
    perplexity_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    same_top: float | None = None
    needle: float | None = None
    needle_trials: int = 0


@dataclass(slots=True, kw_only=True)
class Curve:
    """Perplexity by position: `perplexity[i]` is that of `block` tokens from positions[i] on."""

    name: str
    block: int
    positions: list[int] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)
    note: str = ""


@dataclass(slots=True, kw_only=True)
class Report(Record):
    """One run of `saccade compare`.

    Attributes:
        model, text: facts as {name: value}.
        settings: n_context, n_scored, n_answer, n_batch, quick, dtype.
        baseline: name of the row that ratios and divergences refer to.
        rows: finished rows in the order they ran; curves: perplexity by position.
        seconds: wall time of the run; complete: False after Ctrl-C.
    """

    model: dict[str, Any]
    text: dict[str, Any]
    settings: dict[str, Any]
    baseline: str
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = True
    schema: str = SCHEMA

    def baseline_row(self) -> Row | None:
        """The row that ratios refer to, once it has been measured."""
        return next((r for r in self.rows if r.name == self.baseline and r.status == "ok"), None)


def read(path: Path) -> Report:
    """Read a record back.

    Raises:
        BadInput: not a record of this schema.
    """
    return record.read(path, SCHEMA, _made)


def _made(data: dict[str, Any]) -> Report:
    rows = [Row(**row) for row in data.pop("rows")]
    curves = [Curve(**curve) for curve in data.pop("curves")]
    return Report(**data, rows=rows, curves=curves)
