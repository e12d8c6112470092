"""Finished samples in a file, one a line: what is in it is never computed again.

A line is appended with one write once a sample is finished, so a run that is stopped or killed
loses the sample at hand and no other.  A line that was cut off is left out when the file is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saccade.core import BadInput

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
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            if data and not json.dumps(self._header).encode().startswith(data):
                raise BadInput(f"{path} is no file of samples. Give another file.")
            path.write_bytes(b"")
            self._write(path, self._header)
            return
        try:
            self._check(path, json.loads(lines[0]))
            for line in lines[1:]:
                self._take(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{path} is no file of samples. Give another file.") from error
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def _check(self, path: Path, header: dict[str, Any]) -> None:
        if header.get("schema") != SCHEMA:
            raise BadInput(f"{path} is no file of samples. Give another file.")
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
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
