"""Caches: they store keys and values and give the operators views of them."""

from saccade.cache.base import LayerCache, ShiftKeys
from saccade.cache.dense import DenseCache
from saccade.cache.late_quantized import LateQuantizedCache
from saccade.cache.make import make_layer_cache
from saccade.cache.offloaded import OffloadedCache, StagingBuffers
from saccade.cache.page_allocator import PageAllocator
from saccade.cache.paged import PagedCache, PagePool
from saccade.cache.placing import Placement, PlacingCache
from saccade.cache.quantized import QuantizedCache
from saccade.cache.quantized_ring import QuantizedRing
from saccade.cache.ragged import RaggedCache
from saccade.cache.ring import RingCache
from saccade.cache.sliding import SlidingCache
from saccade.cache.states import StateCache
from saccade.cache.step import Cursor, SteppingCache, StepView
from saccade.cache.summaries import KeySummaries, SummarizingCache

__all__ = [
    "Cursor",
    "DenseCache",
    "KeySummaries",
    "LateQuantizedCache",
    "LayerCache",
    "OffloadedCache",
    "PageAllocator",
    "PagePool",
    "PagedCache",
    "Placement",
    "PlacingCache",
    "QuantizedCache",
    "QuantizedRing",
    "RaggedCache",
    "RingCache",
    "ShiftKeys",
    "SlidingCache",
    "StagingBuffers",
    "StateCache",
    "StepView",
    "SteppingCache",
    "SummarizingCache",
    "make_layer_cache",
]
