"""The record of a comparison: a row for each technique, curves of perplexity by position.

None means "not measured"; a row that could not run says why in `note`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saccade.report import record
from saccade.report.record import Record

SCHEMA = "saccade.compare/2"
OLDER = ("saccade.compare/1",)  # without sweep, claims and reference; its fields mean the same


@dataclass(slots=True, kw_only=True)
class Row:
    """One configuration and what it cost and gave.

    Attributes:
        name: what a person calls it; group: the heading it stands under.
        options: the ContextParams that were not default, and what else makes the row.
        status: "ok", "failed", "stopped" (Ctrl-C or SIGTERM), or "not applicable": the option would
            change nothing for this model.  Any but "ok" says why in `note`.
        total_bytes: weights and peak_bytes together; None in records from before it was counted.
        peak_bytes: most bytes allocated above the loaded model while the context was read.
        cache_bytes: bytes allocated by the caches after the context was read.
        ttft_seconds: time to first token: reading the whole context and choosing a token, with
            the standard error of its mean.
        prefill_tps, decode_tps: tokens a second reading the context and writing an answer, each
            with the standard error of its mean.
        perplexity, perplexity_se: of the scored tokens, with its standard error.
        perplexity_ratio_se: standard error of the ratio of its perplexity to the reference's, from
            the differences token by token (much smaller than that of either perplexity).
        kl, kl_se: mean KL divergence (nats) of the next-token distribution from the reference's.
        same_top: share of scored tokens with the same most likely next token as the reference.
        needle: share of the hidden facts found; needle_trials: how many were asked for.
        parts: of a combination, the names of the rows it combines; what their ratios multiply to
            stands beside what was measured.
    """

    name: str
    group: str
    options: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    note: str = ""
    total_bytes: int | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    ttft_seconds: float | None = None
    ttft_seconds_se: float | None = None
    prefill_tps: float | None = None
    prefill_tps_se: float | None = None
    decode_tps: float | None = None
    decode_tps_se: float | None = None
    perplexity: float | None = None
    perplexity_se: float | None = None
    perplexity_ratio_se: float | None = None
    kl: float | None = None
    kl_se: float | None = None
    same_top: float | None = None
    needle: float | None = None
    needle_trials: int = 0
    parts: list[str] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class SweepPoint:
    """One configuration at one length of the context; the fields are those of `Row`.

    Attributes:
        name: the configuration, the same at every length.
        n_context: tokens of context.
    """

    name: str
    n_context: int
    status: str = "ok"
    note: str = ""
    total_bytes: int | None = None
    peak_bytes: int | None = None
    cache_bytes: int | None = None
    ttft_seconds: float | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    perplexity: float | None = None
    kl: float | None = None
    kl_se: float | None = None


@dataclass(slots=True, kw_only=True)
class Claim:
    """A figure of the chapter that this project implements, beside what was measured here.

    Attributes:
        technique: the row it is about; quantity: what is claimed, such as "memory saved".
        claimed: the chapter's figure as text; measured: this run's, "" where it was not measured.
        reason: why they differ.
    """

    technique: str
    quantity: str
    claimed: str
    measured: str
    reason: str


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
        settings: n_context, n_scored, n_batch, quick, device, dtype.
        baseline: name of the row that stands for the textbook (materialized scores).
        reference: name of the row that stands for what users have (transformers sdpa); divergences
            and colours refer to it.
        rows: finished rows in the order they ran; curves: perplexity by position.
        sweep: the same configurations at several lengths; claims: the chapter's figures.
        seconds: wall time of the run; complete: False after Ctrl-C.
    """

    model: dict[str, Any]
    text: dict[str, Any]
    settings: dict[str, Any]
    baseline: str
    reference: str = ""
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    sweep: list[SweepPoint] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = True
    schema: str = SCHEMA

    def baseline_row(self) -> Row | None:
        """The textbook's row, once it has been measured."""
        return self.row(self.baseline)

    def reference_row(self) -> Row | None:
        """The row of what users have, once it has been measured."""
        return self.row(self.reference)

    def row(self, name: str) -> Row | None:
        """The measured row of that name."""
        return next((r for r in self.rows if r.name == name and r.status == "ok"), None)


def read(path: Path) -> Report:
    """Read a record back; what one of an older schema does not have is left at its default.

    Raises:
        BadInput: not a record of this schema, or a field of the wrong kind.
    """
    return record.read(path, SCHEMA, _made, older=OLDER)


def _made(data: dict[str, Any]) -> Report:
    parts = {name: _each(kind, data.pop(name, [])) for name, kind in _PARTS.items()}
    return record.made(Report, {**data, "schema": SCHEMA, **parts})


def _each(kind: type[Any], entries: list[dict[str, Any]]) -> list[Any]:
    return [record.made(kind, entry) for entry in entries]


_PARTS = {"rows": Row, "curves": Curve, "sweep": SweepPoint, "claims": Claim}
