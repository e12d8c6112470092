"""Floor 1: the operators.  A name says the mathematics, `backend=` says who computes it."""

from saccade.ops.attend.api import attend, attention, explain
from saccade.ops.decode import decode

__all__ = ["attend", "attention", "decode", "explain"]
