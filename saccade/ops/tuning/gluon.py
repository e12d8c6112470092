"""Launches of the Gluon kernels for Hopper: `measured/gluon/sm_90.json`, checked when it is read.

The file has a section for each kernel: `source` (the log or record that its rows come from),
`shared` (fields that all rows have in common; may be left out) and `rows`.  A row is named after
the head dimension that it serves, "128", or "128/varlen" where a kernel has several.  What the
fields mean is said by the dataclass that a kernel's launcher makes of a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from saccade.core import BadInput

SCHEMA = "saccade.gluon/1"
FILE = Path(__file__).parent / "measured" / "gluon" / "sm_90.json"
Rows = Mapping[str, Mapping[str, Any]]
_ROW_NAME = re.compile(r"[1-9][0-9]*(/[a-z_]+)?")


@cache
def rows(kernel: str) -> Rows:
    """The rows of a kernel: "HEAD_DIM" or "HEAD_DIM/variant" -> fields of a launch.

    Raises:
        BadInput: the file cannot be read or is wrong; the sentence says where.
        KeyError: it has no such kernel.
    """
    return _sections()[kernel]


@cache
def _sections() -> Mapping[str, Rows]:
    try:
        return parsed(json.loads(FILE.read_text()))
    except (OSError, ValueError) as error:
        raise BadInput(f"{FILE} is not a table of Gluon launches: {error}.") from error


def parsed(data: object) -> Mapping[str, Rows]:
    """The rows of every kernel in the contents of such a file.

    Raises:
        ValueError: what was expected and what was found, as a clause.
    """
    parts = _object("the file", data, required={"schema", "architecture", "kernels"})
    if parts["schema"] != SCHEMA:
        raise ValueError(f'expected "schema": "{SCHEMA}", got {parts["schema"]!r}')
    kernels = _object("kernels", parts["kernels"])
    return MappingProxyType({name: _rows(name, section) for name, section in kernels.items()})


def _rows(kernel: str, section: object) -> Rows:
    parts = _object(kernel, section, required={"source", "rows"}, optional={"shared"})
    if not isinstance(parts["source"], str):
        raise ValueError(f"{kernel}: source must name a log or record, got {parts['source']!r}")
    shared = _fields(f"{kernel}, shared", parts.get("shared", {}))
    found: dict[str, Mapping[str, Any]] = {}
    for name, row in _object(f"{kernel}, rows", parts["rows"]).items():
        if not _ROW_NAME.fullmatch(name):
            raise ValueError(f'{kernel}: a row is named "128" or "128/variant", got "{name}"')
        found[name] = MappingProxyType(shared | _fields(f"{kernel}, {name}", row))
    return MappingProxyType(found)


def _fields(where: str, row: object) -> dict[str, Any]:
    """The fields of a row: booleans, and numbers of at least 0."""
    fields = _object(where, row)
    for name, value in fields.items():
        if not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"{where}: {name} must be a boolean or a number >= 0, got {value!r}")
    return fields


def _object(
    where: str, data: object, *, required: set[str] | None = None, optional: set[str] | None = None
) -> dict[str, Any]:
    """A JSON object; where `required` is given, with these names and no others but `optional`."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {data!r}")
    parts = cast(dict[str, Any], data)
    if required is not None and not required <= set(parts) <= required | (optional or set()):
        raise ValueError(f"{where}: expected {', '.join(sorted(required))}, got {sorted(parts)}")
    return parts
