"""Measured launches of the batch-1 linear layers (`ops/gemv`), as data per architecture.

`measured/gemv/ARCHITECTURE.json`; an architecture without a file was not measured, and the kernels
are not used there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SCHEMA = "saccade.gemv/1"
FOLDER = Path(__file__).parent / "measured" / "gemv"
LINEAR, GATED_MLP = "linear", "gated_mlp"


@dataclass(frozen=True, slots=True)
class GemvLaunch:
    """How a matrix-vector product is divided.

    Attributes:
        rows: of the matrix, per program; columns: per iteration of its loop, at most.
        warps: of a program.
    """

    rows: int
    columns: int
    warps: int


@cache
def launches(arch: str) -> dict[str, GemvLaunch] | None:
    """The launch of each kernel on an architecture, None where it was not measured."""
    path = FOLDER / f"{arch}.json"
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    assert (data["schema"], data["architecture"]) == (SCHEMA, arch)
    return {name: GemvLaunch(**row) for name, row in data["kernels"].items()}
