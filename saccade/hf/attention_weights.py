"""The matrix of attention weights, made only for a caller who asks for it (output_attentions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import utils

from saccade.core import DenseKV, Unsupported
from saccade.hf.mask import is_traced
from saccade.ops import AttentionCall, attend

_WITHOUT_SINKS: Final = ("GraniteSWAAttention", "GraniteMoeSWAAttention")
"""Classes whose sinks scale the output, after the weights that they return."""


def wants_weights(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """Whether the caller of the model asked for attention weights, by argument or by config.

    Some models do not hand the argument on; transformers then keeps in a ContextVar what the
    outermost call of the model collects.
    """
    config: Any = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        return True
    capturing: Any = getattr(utils, "output_capturing", None)
    active: Any = getattr(capturing, "_active_collector", None)
    collected: Any = None if active is None or is_traced() else active.get()
    return any(name.endswith("attentions") for name in collected or ())


def weights_of(module: nn.Module, call: AttentionCall, num_keys: int) -> Tensor:
    """Softmax weights `[B, H, Lq, num_keys]` of a call, 0 for keys that a query does not see.

    They are what attention makes of the identity matrix as values.  O(Lq * Lk) memory.

    Raises:
        Unsupported: keys that are not stored as one tensor.
    """
    if not isinstance(call.kv, DenseKV) or not call.kv.is_plain:
        raise Unsupported(
            "output_attentions=True needs all keys of a layer as one tensor, which this cache does "
            "not keep. Leave it out, use a cache of transformers, or attn_implementation='eager'."
        )
    k = call.kv.k
    if type(module).__name__ in _WITHOUT_SINKS:
        call = replace(call, sink_logits=None)
    values = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    identity = replace(call, kv=DenseKV(k, values), wants_lse=False)
    weights = attend(identity, backend="reference").out
    return F.pad(weights, (0, num_keys - weights.shape[3]))
