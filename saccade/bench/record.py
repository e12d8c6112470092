"""The record of `saccade bench cpu`: a row for each case and backend, and the bars they met."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saccade.bench.ceilings import Ceilings
from saccade.report import record
from saccade.report.record import Record

SCHEMA = "saccade.bench.cpu/1"


@dataclass(slots=True, kw_only=True)
class BarResult:
    """A bar and what was measured; value and met are None where it could not be evaluated."""

    measure: str
    limit: float
    against: str = ""
    value: float | None = None
    met: bool | None = None


@dataclass(slots=True, kw_only=True)
class Row:
    """One case computed by one backend.

    Attributes:
        case, group, label, work, storage: of the Case; shape: its sizes.
        backend: "cpu", "sdpa", ... of this package, or the name of a peer; ours: which of them.
        status: "ok", "WRONG" (never timed), "cannot" (refused), "failed" (raised).
        note: why, where the status is not "ok".
        error: worst error as a multiple of the allowed one, from the gate.
        flops, nbytes: work of the case.
        seconds: median of one call; spread: distance of the quartiles as a share of it.
        best: seconds of the fastest sample, for runs on a busy machine.
    """

    case: str
    group: str
    label: str
    work: str
    storage: str
    shape: dict[str, int | None]
    backend: str
    ours: bool
    flops: float
    nbytes: int
    status: str = "ok"
    note: str = ""
    error: float | None = None
    seconds: float | None = None
    spread: float | None = None
    best: float | None = None
    samples: int = 0
    bars: list[BarResult] = field(default_factory=list)

    @property
    def flop_rate(self) -> float | None:
        """Floating-point operations a second."""
        return self.flops / self.seconds if self.seconds else None

    @property
    def byte_rate(self) -> float | None:
        """Bytes a second."""
        return self.nbytes / self.seconds if self.seconds else None


@dataclass(slots=True, kw_only=True)
class Benchmark(Record):
    """One run.  `complete` is False after Ctrl-C; `seconds` is its wall time."""

    ceilings: Ceilings
    quick: bool = False
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = True
    schema: str = SCHEMA

    @property
    def is_wrong(self) -> bool:
        """Whether a kernel computed something wrong or broke down."""
        return any(row.status in ("WRONG", "failed") for row in self.rows)

    def find(self, case: str, backend: str) -> Row | None:
        """The timed row of that case and backend."""
        found = (r for r in self.rows if r.case == case and r.backend == backend)
        return next((row for row in found if row.seconds is not None), None)

    def to_json(self) -> str:
        """One line of JSON; an infinite error becomes null."""
        data = asdict(self)
        data["ceilings"] |= {
            "fma_peak": self.ceilings.fma_peak,
            "read_bandwidth": self.ceilings.read_bandwidth,
        }
        for row in data["rows"]:
            if row["error"] is not None and row["error"] == float("inf"):
                row["error"] = None
        return json.dumps(data, allow_nan=False)


def read(path: Path) -> Benchmark:
    """Read a record back.

    Raises:
        BadInput: not a record of this schema.
    """
    return record.read(path, SCHEMA, _made)


def _made(data: dict[str, Any]) -> Benchmark:
    ceilings = data.pop("ceilings")
    for derived in ("fma_peak", "read_bandwidth"):
        ceilings.pop(derived)
    rows = data.pop("rows")
    for row in rows:
        row["bars"] = [BarResult(**bar) for bar in row["bars"]]
    return Benchmark(**data, ceilings=Ceilings(**ceilings), rows=[Row(**row) for row in rows])
