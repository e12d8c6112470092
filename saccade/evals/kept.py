"""Finished samples in a file, one a line: what is in it is never computed again.

A line is appended with one write once a sample is finished, so a run that is stopped or killed
loses the sample at hand and no other.  A line that was cut off is left out when the file is read.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saccade.core import BadInput
from saccade.core.writing import writing_to

SCHEMA = "saccade.eval-samples/1"


class Place(NamedTuple):
    """Which sample of a run: its row and when it was asked, task, length and number."""

    row: str
    asked: str
    task: str
    context: int
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One sample's result.

    Attributes:
        prompt: sha256 of its tokens and right answers, the first 16 digits.
        answers: what the model wrote, and scores: of each, by turn.
        cache_bytes: right after compression; seconds: of the sample.
    """

    prompt: str
    answers: list[str]
    scores: list[float]
    cache_bytes: int
    seconds: float

    @property
    def score(self) -> float:
        """Mean over the turns."""
        return sum(self.scores) / len(self.scores)


class KeptSamples:
    """The finished samples of a run, in memory and, if a path is given, in a file.

    Args:
        made_with: what results depend on besides a sample's place: model, seed, options.

    Raises:
        BadInput: the file holds something else, or samples of another model or seed.
    """

    def __init__(self, path: Path | None, made_with: Mapping[str, Any]) -> None:
        self._path, self._header = path, {"schema": SCHEMA, **made_with}
        self._found: dict[Place, Finished] = {}
        if path is not None:
            self._open(path)

    def get(self, place: Place, prompt: str) -> Finished | None:
        """A finished sample; None: there is none.

        Raises:
            BadInput: one that was made from another text.
        """
        found = self._found.get(place)
        if found is not None and found.prompt != prompt:
            raise BadInput(
                f"{self._path} has another text for sample {place.number} of {place.task} at "
                f"{place.context:,} tokens, so its samples cannot be continued. Give another file."
            )
        return found

    def add(self, place: Place, finished: Finished) -> None:
        """Keep a sample: in the file before in memory."""
        if self._path is not None:
            self._write(self._path, {**place._asdict(), **asdict(finished)})
        self._found[place] = finished

    def _open(self, path: Path) -> None:
        """Read what is there and cut off an unfinished line; or begin the file."""
        data, lines = _lines(path)
        if not lines:
            if data and not json.dumps(self._header).encode().startswith(data):
                raise _other_file(path)
            path.write_bytes(b"")
            self._write(path, self._header)
            return
        self._check(path, lines[0])
        try:
            for line in lines[1:]:
                self._take(line)
        except (TypeError, KeyError, AttributeError) as error:
            raise _other_file(path) from error
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)

    def _check(self, path: Path, header: dict[str, Any]) -> None:
        for name, wanted in self._header.items():
            if header.get(name) != wanted:
                raise BadInput(
                    f"the samples in {path} were made with another {name.replace('_', ' ')} "
                    f"({_short(header.get(name))}, now {_short(wanted)}). Give another file."
                )

    def _take(self, line: dict[str, Any]) -> None:
        place = Place(**{name: line.pop(name) for name in Place._fields})
        self._found[place] = Finished(**line)

    def _write(self, path: Path, line: dict[str, Any]) -> None:
        """Append a line, all of it or nothing: a full disk takes the first part of what it gets."""
        data = json.dumps(line).encode() + b"\n"
        with writing_to(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                before = os.fstat(handle).st_size
                written = os.write(handle, data)
                if written < len(data):
                    os.ftruncate(handle, before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(handle)
            finally:
                os.close(handle)


def check_kept(path: Path) -> None:
    """Raise BadInput for a file that holds something else than samples."""
    data, lines = _lines(path)
    if data and not lines and not b'{"schema": "saccade.eval-samples/'.startswith(data[:33]):
        raise _other_file(path)


def _lines(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """Bytes of a file, and its whole lines.

    Raises:
        BadInput: a line that is no JSON, or a first one that is no header.
    """
    data = path.read_bytes() if path.exists() else b""
    try:
        lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
        if lines and lines[0].get("schema") != SCHEMA:
            raise _other_file(path)
    except (ValueError, AttributeError) as error:
        raise _other_file(path) from error
    return data, lines


def _other_file(path: Path) -> BadInput:
    return BadInput(
        f"{path} is no file of samples, which --keep of `saccade eval` writes. Name another file "
        "there, or one that does not exist yet."
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
