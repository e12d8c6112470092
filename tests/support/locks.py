"""Locks where exceptions are injected line by line."""

from __future__ import annotations

import linecache
import threading
from types import FrameType
from typing import Any


def takes_a_lock(frame: FrameType) -> bool:
    """Whether a line takes a lock or, at the end of its `with`, gives it back.

    Python delivers a signal after a call, never between the last line inside and the release; a
    tracer that raised there would leave the lock taken, and other threads would wait for ever.
    """
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    return line.strip() == "with _LOCK:"


def is_free(lock: Any) -> bool:
    """Whether another thread can take the lock."""
    found: list[bool] = []

    def take() -> None:
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return found[0]
