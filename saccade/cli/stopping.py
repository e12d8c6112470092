"""Ctrl-C, SIGTERM and a closed terminal: one orderly stop for every command.

Each signal raises `Stopped`, which is a KeyboardInterrupt: what keeps finished work on Ctrl-C keeps
it on SIGTERM too.  Inside a `DeferredStop` the first signal only asks, and the work ends at the
next point where everything is whole; a second one stops at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        number: of the signal.
        code: the exit code: 130 for Ctrl-C, 143 for SIGTERM, 129 for a closed terminal.
        at_once: it was the second one, so that work may have been cut off in the middle.
    """

    def __init__(self, number: int, *, at_once: bool = False) -> None:
        super().__init__()
        self.number, self.code, self.at_once = number, 128 + number, at_once


@contextmanager
def stop_signals(came: list[int]) -> Iterator[None]:
    """Inside, each signal raises Stopped, and its number is appended to `came`."""

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Stopped(number)

    with _handling(stop):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handler` gets the signals; those that the caller ignores (nohup) stay ignored."""
    before: dict[int, Any] = {}
    try:
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # only the main thread has signals
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, signal.SIG_DFL if was is None else was)


class DeferredStop:
    """`with` it, the first signal waits for the next token or chunk; a second one does not wait.

    Args:
        waits: what is said on Ctrl-C; ends: on another signal, default the same.

    Attributes:
        asked: the number of the signal that came, None while none has.
    """

    def __init__(
        self, waits: str = "Stopping at the next whole token", ends: str | None = None
    ) -> None:
        self.asked: int | None = None
        self._waits, self._ends = waits, ends or waits
        self._handling: Any = None

    def __enter__(self) -> DeferredStop:
        self._handling = _handling(self._came)
        self._handling.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._handling.__exit__(None, None, None)

    def until_stopped(self, tokens: Iterable[int]) -> Iterator[int]:
        """The tokens, until a signal comes."""
        for token in tokens:
            yield token
            if self.asked is not None:
                return

    def on_chunk(self, done: int, total: int) -> None:
        """Raise Stopped between two chunks of a prompt once a signal has come."""
        if done < total:  # behind the last chunk the first token follows, and stops
            self.check()

    def check(self) -> None:
        """Raise Stopped once a signal has come."""
        if self.asked is not None:
            raise Stopped(self.asked)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            raise Stopped(number, at_once=True)
        self.asked = number
        waits = self._waits if number == signal.SIGINT else self._ends
        said = f"\n{waits}; once more stops at once.\n"
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(sys.stderr.fileno(), said.encode())  # print is not safe in a handler
