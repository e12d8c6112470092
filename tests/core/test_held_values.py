"""A context variable has a value during a call, whatever line of saccade an interrupt comes at."""

from contextvars import ContextVar

import pytest

from saccade.core.held_values import holding
from saccade.hf.rope_tables import reached, reaching
from tests.runtime.interrupts import interrupted, lines_of

VARIABLE = ContextVar("test_held", default=0)


def test_a_call_has_the_value_and_what_follows_has_not():
    def inner(more):
        seen.append(VARIABLE.get() + more)
        if more:
            holding(VARIABLE, 7, inner, 0)
            seen.append(VARIABLE.get())
            raise KeyError

    seen = []
    with pytest.raises(KeyError):
        holding(VARIABLE, 3, inner, more=1)
    assert seen == [4, 7, 3] and VARIABLE.get() == 0


def test_an_interrupt_at_any_line_leaves_no_value():
    def work():
        reaching(5, lambda: reaching(None, reached))

    lines = lines_of(work)
    assert lines > 4
    for at in range(lines):
        assert interrupted(work, at) and reached() is None
