"""Floor 2: memory.  A cache stores keys and values and lends an operator a view of them."""

from saccade.cache.base import LayerCache, ShiftKeys
from saccade.cache.dense import DenseCache
from saccade.cache.make import make_layer_cache
from saccade.cache.offloaded import OffloadedCache, Staging
from saccade.cache.paged import PagedCache, PagePool
from saccade.cache.pages import Pages
from saccade.cache.quantized import QuantizedCache
from saccade.cache.ragged import RaggedCache
from saccade.cache.ring import RingCache
from saccade.cache.step import Cursor, SteppingCache, StepWrite

__all__ = [
    "Cursor",
    "DenseCache",
    "LayerCache",
    "OffloadedCache",
    "PagePool",
    "PagedCache",
    "Pages",
    "QuantizedCache",
    "RaggedCache",
    "RingCache",
    "ShiftKeys",
    "Staging",
    "StepWrite",
    "SteppingCache",
    "make_layer_cache",
]
