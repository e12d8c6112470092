"""How far a long run is: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from saccade.report.numbers import as_duration

Show = Callable[[float, int, str], None]
"""Called with (done, total, what is running now)."""


@contextmanager
def progress(stream: TextIO | None = None) -> Iterator[Show]:
    """Show progress on `stream` (default stderr) inside the `with`."""
    target: Any = stream or sys.stderr
    if target.isatty():
        with _bar(target) as show:
            yield show
    else:
        yield _lines(target)


class TimeLeft:
    """Seconds left, if the rest goes as fast as what is done; None before there is anything."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()
        self._estimate: tuple[float, float] | None = None  # (seconds left, estimated at)

    def update(self, done: float, total: int) -> None:
        """Take in that `done` of `total` steps are over."""
        now = self._now()
        if done > 0:
            self._estimate = ((now - self._start) / done * max(total - done, 0), now)

    def seconds(self) -> float | None:
        """The last estimate, counted down since then."""
        if self._estimate is None:
            return None
        left, since = self._estimate
        return max(0.0, left - (self._now() - since))


def _lines(stream: TextIO) -> Show:
    left = TimeLeft()

    def show(done: float, total: int, label: str) -> None:
        left.update(done, total)
        seconds = left.seconds()
        rest = "" if seconds is None or done >= total else f", about {as_duration(seconds)} left"
        percent = int(100 * done / total) if total else 100
        print(f"[{percent:3d} %] {label}{rest}", file=stream, flush=True)

    return show


@contextmanager
def _bar(stream: TextIO) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.text import Text

    left = TimeLeft()

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = left.seconds()
            return Text("" if seconds is None else f"{as_duration(seconds)} left", style="dim")

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:3.0f} %"),
        Left(),
        TextColumn("{task.description}", markup=False),
    )
    console = Console(file=stream)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: float, total: int, label: str) -> None:
            left.update(done, total)
            bar.update(task, completed=done, total=total, description=label)

        yield show
