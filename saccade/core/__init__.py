"""Floor 0: the words everyone uses.  Torch only, no policy."""

from saccade.core.errors import BadInput, Unsupported
from saccade.core.kv import (
    DenseKV,
    GrowingKV,
    KVView,
    PagedKV,
    QuantizedKV,
    RaggedKV,
    ScaledKV,
    Span,
)
from saccade.core.mask import KeyRange, Mask
from saccade.core.output import AttentionOutput
from saccade.core.scaled import Scaled, quantize_heads
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
    "QuantizedKV",
    "RaggedKV",
    "Scaled",
    "ScaledKV",
    "Span",
    "Unsupported",
    "quantize_heads",
]
