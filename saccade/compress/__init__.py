"""Compression: policies that choose which keys a cache keeps, and selection of tokens.

A new policy is one file and one line in POLICIES, where the contract test finds it.
"""

from saccade.compress.policy import (
    LayerObservation,
    ObservedQueries,
    Policy,
    resolve_budget,
    select,
    select_across_heads,
)
from saccade.compress.received import Received, received_attention
from saccade.compress.snapkv import AdaSnapKV, SnapKV
from saccade.compress.tokens import compress_context

POLICIES: dict[str, type[Policy]] = {"snapkv": SnapKV, "ada_snapkv": AdaSnapKV}
"""Value of `kv_policy` -> policy."""

__all__ = [
    "POLICIES",
    "AdaSnapKV",
    "LayerObservation",
    "ObservedQueries",
    "Policy",
    "Received",
    "SnapKV",
    "compress_context",
    "received_attention",
    "resolve_budget",
    "select",
    "select_across_heads",
]
