"""Floor 3: what to keep.  Policies for caches, importance for tokens.

Adding a policy is one file and one line in POLICIES; the contract test finds it there.
"""

from saccade.compress.policy import Observed, Policy, resolve_budget, select
from saccade.compress.received import received_attention
from saccade.compress.snapkv import SnapKV
from saccade.compress.tokens import compress_context

POLICIES: dict[str, type[Policy]] = {"snapkv": SnapKV}

__all__ = [
    "POLICIES",
    "Observed",
    "Policy",
    "SnapKV",
    "compress_context",
    "received_attention",
    "resolve_budget",
    "select",
]
