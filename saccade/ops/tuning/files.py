"""Files of launch configurations: one an architecture, one row a line, checked when read.

A file is JSON: `schema`, `architecture`, `measured` (how the rows were found, for people) and
`kernels`, which maps the name of a kernel to its rows.  A row is for head dimensions up to its
`dim`; rows are in ascending order.  `saccade bench tune` writes such a file, which can be put into
the package unchanged.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from saccade.core import BadInput

SCHEMA = "saccade.tuning/2"


@dataclass(frozen=True, slots=True)
class Launch:
    """Tile sizes and launch options of a kernel.

    Attributes:
        block_m, block_n: queries and keys of a tile (decode: block_m is an upper bound).
        warps, stages: warps of a program, depth of its load pipeline.
        tma: load tiles by TMA, where strides allow it.
        per_sm: programs to aim for per multiprocessor when decoding splits the keys.
        registers: limit per thread, 0 for none.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False
    per_sm: int = 1
    registers: int = 0

    def __str__(self) -> str:
        """`128x64 8w 3s`, and the fields that differ from their defaults."""
        named = {"tma": "TMA", "per_sm": f"{self.per_sm} per multiprocessor"}
        named["registers"] = f"{self.registers} registers"
        defaults = {part.name: part.default for part in fields(self)}
        more = [text for name, text in named.items() if getattr(self, name) != defaults[name]]
        return ", ".join((f"{self.block_m}x{self.block_n} {self.warps}w {self.stages}s", *more))


Table = tuple[tuple[int, Launch], ...]
_FIELDS = {part.name: part for part in fields(Launch)}
_LIMITS = {  # smallest and largest value; tiles and warps are powers of two
    "block_m": (16, 1024), "block_n": (16, 1024), "warps": (1, 32), "stages": (1, 16),
    "per_sm": (1, 64), "registers": (0, 255),
}  # fmt: skip
_POWERS = ("block_m", "block_n", "warps")


@dataclass(slots=True, kw_only=True)
class LaunchFile:
    """The contents of a file.

    Attributes:
        architecture: "sm_90", or "default" and "interpreter" of the package.
        kernels: rows of each kernel, as (largest head dimension, launch) in ascending order.
        measured: GPU, versions, date, ceilings, and other facts of the measurement.
        trials: how each row was found, for people: one record for each launch that was tried.
    """

    architecture: str
    kernels: dict[str, Table] = field(default_factory=dict[str, Table])
    measured: dict[str, Any] = field(default_factory=dict[str, Any])
    trials: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def read(path: Path, known: Collection[str]) -> LaunchFile:
    """The file's contents; `known` are the names of kernels that exist.

    Raises:
        BadInput: no such file, or not such a table; the message says which row is wrong and why.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from error
    try:
        return _parse(data, known)
    except ValueError as error:
        raise BadInput(f"{path} is not a table of launches: {error}.") from None


def to_json(file: LaunchFile) -> str:
    """The text of a file, one row per line."""
    kernels = ",\n".join(
        f"  {json.dumps(name)}: [\n"
        + ",\n".join(f"   {json.dumps({'dim': dim} | _fields_of(launch))}" for dim, launch in table)
        + "\n  ]"
        for name, table in file.kernels.items()
    )
    lines = [
        f' "schema": {json.dumps(SCHEMA)}',
        f' "architecture": {json.dumps(file.architecture)}',
        f' "measured": {json.dumps(file.measured)}',
        f' "kernels": {{\n{kernels}\n }}',
    ]
    if file.trials:
        trials = ",\n".join(f"  {json.dumps(trial)}" for trial in file.trials)
        lines.append(f' "trials": [\n{trials}\n ]')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def overlay(below: Table, above: Table) -> Table:
    """Rows of both; where both have a row for a head dimension, the one of `above`."""
    return tuple(sorted((dict(below) | dict(above)).items()))


def parse_launch(row: Mapping[str, Any]) -> Launch:
    """A Launch from its fields.

    Raises:
        ValueError: a field that is missing, unknown or impossible, as a clause.
    """
    for name in row:
        if name not in _FIELDS:
            raise ValueError(f"unknown field {name!r}{_suggestion(name, _FIELDS)}")
    missing = [name for name in ("block_m", "block_n", "warps", "stages") if name not in row]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    for name, value in row.items():
        _check(name, value)
    return Launch(**row)


def _parse(data: object, known: Collection[str]) -> LaunchFile:
    if not isinstance(data, dict):
        raise ValueError("expected an object")
    entries = cast(dict[str, Any], data)
    if entries.get("schema") != SCHEMA:
        raise ValueError(f'expected "schema": "{SCHEMA}", got {entries.get("schema")!r}')
    arch, kernels = entries.get("architecture"), entries.get("kernels")
    if not isinstance(arch, str) or not isinstance(kernels, dict):
        raise ValueError('expected "architecture" (a name such as "sm_90") and "kernels"')
    tables: dict[str, Table] = {}
    for name, rows in cast(dict[str, Any], kernels).items():
        if name not in known:
            raise ValueError(f"unknown kernel {name!r}{_suggestion(name, known)}")
        tables[name] = _parse_table(name, rows)
    return LaunchFile(
        architecture=arch,
        kernels=tables,
        measured=entries.get("measured", {}),
        trials=entries.get("trials", []),
    )


def _parse_table(name: str, rows: object) -> Table:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{name} needs a list of rows")
    table: list[tuple[int, Launch]] = []
    for at, row in enumerate(cast(list[dict[str, Any]], rows), 1):
        try:
            dim = row.get("dim")
            if not isinstance(dim, int) or not 1 <= dim <= 4096:
                raise ValueError(f"dim must be the largest head dimension of the row, got {dim!r}")
            if table and dim <= table[-1][0]:
                raise ValueError(f"dims must increase, but {dim} follows {table[-1][0]}")
            table.append((dim, parse_launch({k: v for k, v in row.items() if k != "dim"})))
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{name}, row {at}: {error}") from None
    return tuple(table)


def _check(name: str, value: object) -> None:
    if name == "tma":
        if not isinstance(value, bool):
            raise ValueError(f"tma must be true or false, got {value!r}")
        return
    low, high = _LIMITS[name]
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    if name in _POWERS and value & (value - 1):
        raise ValueError(f"{name} must be a power of two, got {value}")


def _fields_of(launch: Launch) -> dict[str, Any]:
    """The fields of a row, without those that have their default value."""
    return {k: v for k, v in asdict(launch).items() if v != _FIELDS[k].default}


def _suggestion(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(known)}"
