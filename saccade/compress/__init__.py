"""Compression: policies that choose which keys a cache keeps, and selection of tokens.

A new policy is one file and one line in POLICIES, where the contract test finds it.
"""

from saccade.compress.adakv import AdaExpectedAttention, AdaSnapKV
from saccade.compress.budget import Budget, in_keys, resolve_budget
from saccade.compress.criticalkv import CriticalAdaSnapKV, CriticalSnapKV
from saccade.compress.expected_attention import ExpectedAttention
from saccade.compress.h2o import H2O
from saccade.compress.keydiff import KeyDiff
from saccade.compress.knorm import Knorm
from saccade.compress.kvzip import KVzip, UniformKVzip
from saccade.compress.observation import (
    ExpectedQueries,
    LayerObservation,
    ObservedQueries,
    Observes,
    Rereading,
)
from saccade.compress.policy import Policy, select, select_across_heads
from saccade.compress.pyramidkv import PyramidKV
from saccade.compress.received import Received, received_attention
from saccade.compress.rkv import RKV
from saccade.compress.snapkv import SnapKV
from saccade.compress.streaming_llm import StreamingLLM
from saccade.compress.tokens import compress_context
from saccade.compress.tova import TOVA
from saccade.compress.units import keep_units, sentence_starts

POLICIES: dict[str, type[Policy]] = {
    "snapkv": SnapKV,
    "ada_snapkv": AdaSnapKV,
    "critical_snapkv": CriticalSnapKV,
    "critical_ada_snapkv": CriticalAdaSnapKV,
    "pyramidkv": PyramidKV,
    "expected_attention": ExpectedAttention,
    "ada_expected_attention": AdaExpectedAttention,
    "tova": TOVA,
    "keydiff": KeyDiff,
    "knorm": Knorm,
    "streaming_llm": StreamingLLM,
    "kvzip": KVzip,
    "uniform_kvzip": UniformKVzip,
    "h2o": H2O,
    "rkv": RKV,
}
"""Value of `kv_policy` -> policy."""

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "TOVA",
    "AdaExpectedAttention",
    "AdaSnapKV",
    "Budget",
    "CriticalAdaSnapKV",
    "CriticalSnapKV",
    "ExpectedAttention",
    "ExpectedQueries",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LayerObservation",
    "ObservedQueries",
    "Observes",
    "Policy",
    "PyramidKV",
    "Received",
    "Rereading",
    "SnapKV",
    "StreamingLLM",
    "UniformKVzip",
    "compress_context",
    "in_keys",
    "keep_units",
    "received_attention",
    "resolve_budget",
    "select",
    "select_across_heads",
    "sentence_starts",
]
