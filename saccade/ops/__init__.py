"""Floor 1: the operators.  A name says the mathematics, `backend=` says who computes it."""

from saccade.ops.attention.api import attend, attention, explain

__all__ = ["attend", "attention", "explain"]
