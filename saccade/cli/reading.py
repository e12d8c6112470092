"""How far a prompt is read: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from saccade.cli.progress import TimeLeft
from saccade.report.numbers import as_duration
from saccade.units import significant

T = TypeVar("T")
OnProgress = Callable[[int, int], None]
SECONDS = 5.0
"""Least time between two lines, which grows with the time that has passed."""
_WIDTH = 12


@contextmanager
def reading(
    *,
    least: int = 0,
    stream: TextIO | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Iterator[OnProgress]:
    """Inside, call what it gives with (tokens read, all of them); the bar is gone afterwards.

    Args:
        least: prompts of no more tokens are not worth showing.
    """
    target = stream or sys.stderr
    shown = _Bar(target, now) if _draws(target) else _Lines(target, now)

    def show(done: int, total: int) -> None:
        if total > least:
            shown.show(done, total)

    try:
        yield show
    finally:
        shown.end()


def while_reading(
    start: Callable[[OnProgress], Iterator[T]],
    *,
    shown: bool,
    least: int,
    on_chunk: OnProgress,
) -> Iterator[T]:
    """What `start(on_progress)` yields; how far the prompt is read is shown before the first.

    Args:
        on_chunk: called after every part of the prompt; it may raise.
    """
    with reading(least=least) if shown else contextlib.nullcontext() as show:

        def on_progress(done: int, total: int) -> None:
            if show is not None:
                show(done, total)
            if done:
                on_chunk(done, total)

        stream = start(on_progress)
        first = next(stream, None)
    if first is not None:
        yield first
        yield from stream


def _draws(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class _Shown:
    """The words for a state: how much of it, how fast, what is left."""

    def __init__(self, stream: TextIO, now: Callable[[], float]) -> None:
        self._stream, self._now, self._left = stream, now, TimeLeft(now)
        self._start = now()

    def _words(self, done: int, total: int) -> str:
        self._left.update(done, total)
        passed, seconds = self._now() - self._start, self._left.seconds()
        if not done or passed <= 0 or seconds is None:
            return f"{total:,} tokens"
        speed = f"{significant(done / passed)} tokens/s"
        return f"{done:,} of {total:,} tokens, {speed}, {as_duration(seconds)} left"

    def show(self, done: int, total: int) -> None:
        """Tell the state."""
        raise NotImplementedError

    def end(self) -> None:
        """Leave nothing behind."""


class _Bar(_Shown):
    """One line that is drawn again, and removed at the end."""

    _drawn = False

    def show(self, done: int, total: int) -> None:
        """Draw the state."""
        full = _WIDTH * done // max(1, total)
        line = f"reading [{'#' * full}{'.' * (_WIDTH - full)}] {self._words(done, total)}"
        room = shutil.get_terminal_size().columns - 1
        self._stream.write(f"\r\x1b[K{line[: max(8, room)]}")
        self._stream.flush()

        self._drawn = True

    def end(self) -> None:
        """Remove the line."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


class _Lines(_Shown):
    """Lines that are not too many: a prompt of a moment has none."""

    def __init__(self, stream: TextIO, now: Callable[[], float]) -> None:
        super().__init__(stream, now)
        self._last = self._start

    def show(self, done: int, total: int) -> None:
        """Print the state, unless the last one is fresh or all is read."""
        moment, words = self._now(), self._words(done, total)
        wait = max(SECONDS, (moment - self._start) / 10)
        if 0 < done < total and moment - self._last >= wait:
            self._last = moment
            print(f"Read {words}.", file=self._stream, flush=True)
