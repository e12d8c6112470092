"""The operators: attention, fused linear layers of a decoding step, writing keys and values."""

from saccade.ops.attention.api import attend, attention, explain, make_call
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.received import attend_received

__all__ = ["AttentionCall", "attend", "attend_received", "attention", "explain", "make_call"]
