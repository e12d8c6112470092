"""The operators: attention, fused linear layers of a decoding step, writing keys and values."""

from saccade.ops.attention.api import attend, attention, explain, make_call
from saccade.ops.attention.call import AttentionCall

__all__ = ["AttentionCall", "attend", "attention", "explain", "make_call"]
