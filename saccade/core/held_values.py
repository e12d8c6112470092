"""Context variables that have a value during one call, and never behind it."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import ParamSpec, TypeVar

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


def holding(
    variable: ContextVar[T],
    value: T,
    call: Callable[P, R],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """`call(*args, **kwargs)` with this value of the variable.

    Ctrl-C may arrive between any two lines of Python, those that reset a variable among them.  So
    nothing is reset: the call has a context of its own, which `contextvars.Context.run`, compiled
    code, leaves with it.  Other context variables that are set inside end with it as well.
    """

    def called() -> R:
        variable.set(value)
        return call(*args, **kwargs)

    return copy_context().run(called)
