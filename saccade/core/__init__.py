"""Masks, views of stored keys, storage formats, checks.  Needs only torch and psutil."""

# ruff: noqa: E402 (an old torch is refused before anything is imported from it)
from saccade.core.versions import require

require("torch")

from saccade.core.errors import BadInput, Unsupported
from saccade.core.fp8 import PerHeadFP8, quantize_fp8_per_head
from saccade.core.kv import DenseKV, KVView, PerHeadFP8KV, Span
from saccade.core.mask import KeyRange, Mask
from saccade.core.output import AttentionOutput
from saccade.core.paged_kv import PagedKV, RaggedKV
from saccade.core.quantized_kv import GrowingKV, QuantizedKV
from saccade.core.selection import BlockSelection

__all__ = [
    "AttentionOutput",
    "BadInput",
    "BlockSelection",
    "DenseKV",
    "GrowingKV",
    "KVView",
    "KeyRange",
    "Mask",
    "PagedKV",
    "PerHeadFP8",
    "PerHeadFP8KV",
    "QuantizedKV",
    "RaggedKV",
    "Span",
    "Unsupported",
    "quantize_fp8_per_head",
]
