"""Output files of a command: checked before the work begins, written atomically at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from saccade.cli.failure import UsageError
from saccade.cli.values import file_name


def file_option(flag: str, help: str) -> Any:
    """A typer option that takes the name of a file."""
    return typer.Option(flag, metavar="FILE", parser=file_name, help=help)


def check_outputs(paths: Mapping[str, str | None]) -> None:
    """Raise UsageError unless every {option: path} can be written later.

    A run of minutes must not end at a folder that never existed.
    """
    taken: dict[Path, str] = {}
    for option, name in paths.items():
        if name is None:
            continue
        path = Path(name).expanduser()
        _check(option, name, path)
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise UsageError(f"{other} and {option} name the same file {name}. Use two files.")


def names_of_a_part(files: Mapping[str, str | None]) -> dict[str, str | None]:
    """Other names for the files of a run that did not end: `r.json` becomes `r.stopped-1.json`.

    They replace neither the files of a whole run nor an earlier part of one.
    """

    written = {name: Path(file) for name, file in files.items() if file not in (None, "-")}
    number = 1
    while any(_part(path, number).expanduser().exists() for path in written.values()):
        number += 1
    return {**files, **{name: str(_part(path, number)) for name, path in written.items()}}


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}.stopped-{number}{path.suffix}")


def _check(option: str, name: str, path: Path) -> None:
    if name in ("", "-"):
        raise UsageError(f"{option} needs the name of a file, got {name!r}.")
    if path.is_dir():
        raise UsageError(f"{option} {name} is a folder; expected the name of a file.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{option} {name} is not a regular file and cannot be replaced.")
    if not path.parent.is_dir():
        raise UsageError(
            f"{option} {name} cannot be written: there is no folder {path.parent}. Create it first."
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {name} cannot be written: no permission in {path.parent}.")
