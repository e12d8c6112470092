"""The errors that callers meet.  Each text says what was expected, what came and what to do."""

from __future__ import annotations


class Unsupported(ValueError):
    """A correct request that the chosen backend, cache or model does not support.

    An explicit choice never falls back silently, so this is raised instead.
    """


class BadInput(ValueError):
    """A file, text or option from outside that cannot be used as it is."""
