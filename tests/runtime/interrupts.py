"""Raising an exception at a chosen line of saccade's own code, as Ctrl-C would."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import saccade
from tests.support.locks import takes_a_lock

FOLDER = str(Path(saccade.__file__).parent)


class Interrupt(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


class Lines:
    """Counts the lines of saccade that run inside the `with`, and raises at one of them.

    Args:
        at: the line to raise at, counted from 0; None for none.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> Lines:
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _called(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(FOLDER) else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Callable[..., Any]:
        if event == "line" and not takes_a_lock(frame):
            self.count += 1
            if self.count - 1 == self.at:
                raise Interrupt
        return self._line


def lines_of(work: Callable[[], object]) -> int:
    """How many lines a call takes."""
    with Lines() as lines:
        work()
    return lines.count


def interrupted(work: Callable[[], object], at: int) -> bool:
    """Whether a call was interrupted at that line."""
    try:
        with Lines(at):
            work()
    except Interrupt:
        return True
    return False
