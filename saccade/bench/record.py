"""The record of a benchmark run: what was measured, where, and how to read it back.

The table, the picture and the docs are renderings of it; nothing is measured twice.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saccade.bench.ceilings import Ceilings
from saccade.core import BadInput
from saccade.report.files import write_whole

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
class Record:
    """One run.  `complete` is False after Ctrl-C; `seconds` is its wall time."""

    machine: dict[str, Any]
    ceilings: Ceilings
    created: str
    version: str
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

    def to_json(self, *, indent: int | None = None) -> str:
        """JSON text, one line by default; an infinite error becomes null."""
        data = asdict(self)
        data["ceilings"] |= {
            "fma_peak": self.ceilings.fma_peak,
            "read_bandwidth": self.ceilings.read_bandwidth,
        }
        for row in data["rows"]:
            if row["error"] is not None and row["error"] == float("inf"):
                row["error"] = None
        return json.dumps(data, indent=indent, allow_nan=False)

    def write(self, path: Path) -> None:
        """Write the record whole or not at all."""
        write_whole(path, self.to_json(indent=1) + "\n")


def read(path: Path) -> Record:
    """Read a record back.

    Raises:
        BadInput: not a record of this schema.
    """
    try:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"schema {data.get('schema')!r}")
        ceilings = data.pop("ceilings")
        for derived in ("fma_peak", "read_bandwidth"):
            ceilings.pop(derived)
        rows = [
            Row(**{**row, "bars": [BarResult(**bar) for bar in row["bars"]]})
            for row in data.pop("rows")
        ]
        return Record(**data, ceilings=Ceilings(**ceilings), rows=rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{path} is not a {SCHEMA} record ({error}).") from error
