"""Files of launch configurations: one an architecture, one row a line, checked when read.

A file is JSON: `schema`, `architecture`, `measured` (how the rows were found, for people) and
`kernels`, which maps the name of a kernel to its rows.  A row serves head dimensions up to its
`dim`; rows go upwards.  `saccade bench tune` writes such a file, and a file that it wrote can be
put into the package as it is.
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
    """How a kernel is cut and launched.

    Attributes:
        block_m, block_n: queries and keys of a tile (decode: keys only, rows follow the group).
        warps, stages: warps of a program, depth of its load pipeline.
        tma: load tiles by TMA, where strides allow it.
        per_sm: programs to aim for per multiprocessor when decoding splits the keys.
        registers: most registers a thread may take, 0 for what the compiler likes.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False
    per_sm: int = 1
    registers: int = 0

    def __str__(self) -> str:
        """`128x64 8w 3s`, and what differs from the usual."""
        named = {"tma": "TMA", "per_sm": f"{self.per_sm} a multiprocessor"}
        named["registers"] = f"{self.registers} registers"
        usual = {part.name: part.default for part in fields(self)}
        more = [text for name, text in named.items() if getattr(self, name) != usual[name]]
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
    """What such a file holds.

    Attributes:
        architecture: "sm_90", or "default" and "interpreter" of the package.
        kernels: rows of each kernel, as (largest head dimension, launch) going upwards.
        measured: card, versions, date, ceilings, or anything else that people should know.
        trials: how each row was found, for people: one record a launch that was tried.
    """

    architecture: str
    kernels: dict[str, Table] = field(default_factory=dict[str, Table])
    measured: dict[str, Any] = field(default_factory=dict[str, Any])
    trials: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def read(path: Path, known: Collection[str]) -> LaunchFile:
    """The file's contents; `known` are the names of kernels that exist.

    Raises:
        BadInput: no such file, or not such a table; the sentence says which row is wrong and why.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}.") from error
    try:
        return _parsed(data, known)
    except ValueError as error:
        raise BadInput(f"{path} is not a table of launches: {error}.") from None


def to_json(file: LaunchFile) -> str:
    """The text of a file: one row a line, so that a change of a row is a change of a line."""
    kernels = ",\n".join(
        f"  {json.dumps(name)}: [\n"
        + ",\n".join(f"   {json.dumps({'dim': dim} | _told(launch))}" for dim, launch in table)
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


def joined(below: Table, above: Table) -> Table:
    """Rows of both; where both have a row for a head dimension, the one of `above`."""
    return tuple(sorted((dict(below) | dict(above)).items()))


def as_launch(row: Mapping[str, Any]) -> Launch:
    """A Launch from its fields.

    Raises:
        ValueError: a field that is missing, unknown or impossible, as a clause.
    """
    for name in row:
        if name not in _FIELDS:
            raise ValueError(f"unknown field {name!r}{_near(name, _FIELDS)}")
    missing = [name for name in ("block_m", "block_n", "warps", "stages") if name not in row]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    for name, value in row.items():
        _check(name, value)
    return Launch(**row)


def _parsed(data: object, known: Collection[str]) -> LaunchFile:
    if not isinstance(data, dict):
        raise ValueError("expected an object")
    parts = cast(dict[str, Any], data)
    if parts.get("schema") != SCHEMA:
        raise ValueError(f'expected "schema": "{SCHEMA}", got {parts.get("schema")!r}')
    arch, kernels = parts.get("architecture"), parts.get("kernels")
    if not isinstance(arch, str) or not isinstance(kernels, dict):
        raise ValueError('expected "architecture" (a name such as "sm_90") and "kernels"')
    tables: dict[str, Table] = {}
    for name, rows in cast(dict[str, Any], kernels).items():
        if name not in known:
            raise ValueError(f"unknown kernel {name!r}{_near(name, known)}")
        tables[name] = _table(name, rows)
    return LaunchFile(
        architecture=arch,
        kernels=tables,
        measured=parts.get("measured", {}),
        trials=parts.get("trials", []),
    )


def _table(name: str, rows: object) -> Table:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{name} needs a list of rows")
    table: list[tuple[int, Launch]] = []
    for at, row in enumerate(cast(list[dict[str, Any]], rows), 1):
        try:
            dim = row.get("dim")
            if not isinstance(dim, int) or not 1 <= dim <= 4096:
                raise ValueError(f"dim must be the largest head dimension it serves, got {dim!r}")
            if table and dim <= table[-1][0]:
                raise ValueError(f"rows go upwards, but dim {dim} follows {table[-1][0]}")
            table.append((dim, as_launch({k: v for k, v in row.items() if k != "dim"})))
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


def _told(launch: Launch) -> dict[str, Any]:
    """The fields that a row has to say."""
    return {k: v for k, v in asdict(launch).items() if v != _FIELDS[k].default}


def _near(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else f"; there are {', '.join(known)}"
