"""The operators.  A name says the mathematics, `backend=` says who computes it."""

from saccade.ops.attention.api import attend, attention, explain, make_call
from saccade.ops.attention.call import AttentionCall

__all__ = ["AttentionCall", "attend", "attention", "explain", "make_call"]
