"""How much memory caches will take, from facts alone."""

from __future__ import annotations

from saccade.core import Mask
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams

BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "int8": 1.0, "int4": 0.5, "fp8": 1.0}


def cache_bytes(facts: ModelFacts, params: ContextParams, tokens: int) -> int:
    """Bytes of keys and values for `tokens` tokens, without rounding to allocation steps."""
    own = float(facts.dtype.itemsize)
    per_token = (
        facts.num_kv_heads
        * facts.head_dim
        * (BYTES.get(params.type_k or "", own) + BYTES.get(params.type_v or "", own))
    )
    slots = 0
    for model_window in facts.windows:
        window = model_window if model_window is not None else params.n_swa
        mask = Mask(window=window, sinks=params.n_sinks if window is not None else 0)
        slots += mask.num_slots(tokens, params.n_batch)
    return int(slots * per_token)
