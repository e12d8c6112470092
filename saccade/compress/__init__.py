"""Floor 3: what to keep.  Policies for caches, importance for tokens.

Adding a policy is one file and one line in POLICIES; the contract test finds it there.
"""

from saccade.compress.policy import (
    Observed,
    Policy,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.compress.received import received_attention
from saccade.compress.snapkv import AdaSnapKV, SnapKV
from saccade.compress.tokens import compress_context

POLICIES: dict[str, type[Policy]] = {"snapkv": SnapKV, "ada_snapkv": AdaSnapKV}

__all__ = [
    "POLICIES",
    "AdaSnapKV",
    "Observed",
    "Policy",
    "SnapKV",
    "compress_context",
    "received_attention",
    "resolve_budget",
    "select",
    "select_across_heads",
]
