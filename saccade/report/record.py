"""What every record on disk says of itself: which tree made it, how to make it again, where, when.

Records are written as JSON and never recomputed: tables, pictures and the docs are renderings of
them.  `saccade compare`, `saccade bench` and `benchmarks/*.py` write theirs through this file.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from saccade.core import BadInput
from saccade.report import environment
from saccade.report.files import write_whole

_Made = TypeVar("_Made")


@dataclass(slots=True, kw_only=True)
class Record:
    """A measurement on disk.

    Attributes:
        revision: git revision of the tree that ran, "+changes" appended where its code differed
            from that commit; None where there is no checkout.
        command: how to measure it again, from the root of the repository.
        environment: the machine and the versions (`environment.facts`).
        date: when the run began, ISO 8601, UTC.
        schema: what kind of record this is, and its version.
    """

    revision: str | None
    command: str
    environment: dict[str, Any]
    date: str
    schema: str = ""

    def to_json(self) -> str:
        """The record as one line of JSON, in which a number that is not finite is null."""
        return json.dumps(_finite(asdict(self)), allow_nan=False)

    def write(self, path: Path) -> None:
        """Write the record atomically."""
        write_whole(path, as_text(json.loads(self.to_json())))


def origin(command: str | None = None) -> dict[str, Any]:
    """The fields of a `Record` for a run that begins now; default command: that of this process."""
    return {
        "revision": environment.revision(),
        "command": command or this_command(),
        "environment": environment.facts(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def this_command(argv: Sequence[str] | None = None) -> str:
    """The command line of this process; absolute paths, which are private, are cut to names."""
    program, *words = argv or sys.argv
    path = Path(program)
    if path.name == "saccade" or path == environment.ROOT / "saccade/__main__.py":
        called = ["saccade"]
    elif module := _module(program):
        called = ["python", "-m", module]
    elif path.resolve().is_relative_to(environment.ROOT):
        called = ["python", str(path.resolve().relative_to(environment.ROOT))]
    else:
        called = [path.name]
    return shlex.join([*called, *(Path(w).name if Path(w).is_absolute() else w for w in words)])


def _module(program: str) -> str:
    """The name under which `python -m` runs the program, "" where it was started otherwise."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "" if spec is None or spec.origin != program else spec.name


def as_text(data: Mapping[str, Any]) -> str:
    """JSON text with a line for each field and for each item of a list, so that diffs are short."""
    parts: list[str] = []
    for name, value in data.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in value)
            text = f"[\n{rows}\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _finite(value: Any) -> Any:
    """JSON has no infinity: one broken perplexity must not cost the record of a long run."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(
    path: Path,
    schema: str,
    make: Callable[[dict[str, Any]], _Made],
    *,
    older: Sequence[str] = (),
) -> _Made:
    """What `make` builds from a record of that schema, or of an older one that it can read too.

    Raises:
        BadInput: not a record of these schemas.
    """
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise BadInput(
            f"{path} cannot be read: {error.strerror}. Expected a {schema} record."
        ) from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not a {schema} record ({error}).") from error
    try:
        data = json.loads(text)
        if data.get("schema") not in (schema, *older):
            raise ValueError(f"schema {data.get('schema')!r}")
        return make(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} is not a {schema} record ({error}).") from error


def made(kind: type[_Made], data: dict[str, Any]) -> _Made:
    """A dataclass of JSON's values, each of the kind that its field declares.

    Raises:
        TypeError, ValueError: fields that do not exist or are missing, or another kind of value.
    """
    result, declared = kind(**data), get_type_hints(kind)
    for name, value in data.items():
        if not _fits(value, declared[name]):
            raise ValueError(f"{kind.__name__}.{name} is {value!r}")
    return result


def _fits(value: Any, declared: Any) -> bool:
    kinds = get_args(declared) if isinstance(declared, UnionType) else (declared,)
    plain = tuple(get_origin(kind) or kind for kind in kinds)
    if isinstance(value, bool):
        return bool in plain
    if isinstance(value, float) and not math.isfinite(value):
        return False
    fits = isinstance(value, (*plain, int) if float in plain else plain)
    if fits and isinstance(value, list) and get_args(declared)[0] in (int, float):
        return all(v is None or isinstance(v, (int, float)) for v in value)
    return fits
