"""What measured rules say of a call: its `Facts`, and the rules of its device.

The first rule that fits a call says which backends `dispatch` puts before its usual order.  Rules
are data (`ops/tuning/rules.py`), per architecture of a GPU and per family of CPUs; architectures
without a file, and calls that no rule fits, have the usual order.  Nothing here calls a backend.

cuDNN is a special case.  It builds a plan for every new shape, about 70 milliseconds of the host's
time and 145 with gradients, while most calls save microseconds to a few milliseconds.  Where
lengths change from call to call the plan costs more than it saves, and `auto` cannot predict that.
So a rule prefers cuDNN only where 16 calls of one shape save more than the plan costs (one pass
over the layers of a small model), or 150 calls for training (five steps of 32 layers), whose shapes
repeat.  `backend="sdpa"` always allows it.
"""

from __future__ import annotations

import torch

from saccade.core import DenseKV, GrowingKV, PagedKV, QuantizedKV
from saccade.core.hardware import processor_family
from saccade.ops.attention.call import AttentionCall
from saccade.ops.gpu.support import architecture
from saccade.ops.tuning.rules import NO_RULES, Facts, Rule, RuleSet, rules

__all__ = ["NO_RULES", "Facts", "Rule", "RuleSet", "facts_of", "rules_for", "storage_of"]

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def rules_for(device: torch.device) -> RuleSet:
    """The rules of a device, NO_RULES where nothing was measured."""
    if device.type == "cpu":
        return rules(processor_family())
    return NO_RULES if device.type != "cuda" else rules(architecture(device))


def may_decide(call: AttentionCall) -> bool:
    """Whether a rule could change what `auto` takes: costs a decoding step nothing on a CPU."""
    return call.q.shape[2] >= rules_for(call.q.device).fewest_queries


def facts_of(call: AttentionCall) -> Facts:
    """What rules compare of a call."""
    batch, heads, queries, dim = call.q.shape
    sequences = 1 if call.cu_seqlens is None else max(1, len(call.cu_seqlens[1]) - 1)
    keys, mask = call.kv.shape[2], call.mask
    pattern = "all"
    if mask.causal:
        pattern = "causal" if mask.window is None or mask.window >= keys else "window"
    return Facts(
        head_dim=dim,
        pattern=pattern,
        training=call.needs_grad,
        storage=storage_of(call),
        queries=queries,
        keys=keys // sequences,
        rows=batch * heads * queries,
        group_rows=call.group_rows,
        dtype=_DTYPES.get(call.q.dtype, str(call.q.dtype)),
        extras=extras_of(call),
    )


def extras_of(call: AttentionCall) -> str:
    """One of EXTRAS."""
    others = (call.softcap, call.sink_logits, call.alibi_slopes, call.blocks)
    masked, padded = call.attn_mask is not None, call.key_padding is not None
    if any(x is not None for x in others) or (masked and padded):
        return "others"
    return "attn_mask" if masked else "key_padding" if padded else "none"


def storage_of(call: AttentionCall) -> str:
    """One of STORAGE, or another view's name, for which nothing was measured."""
    if call.cu_seqlens is not None:
        return "packed"
    if isinstance(call.kv, PagedKV):
        return "pages"
    if isinstance(call.kv, QuantizedKV | GrowingKV):
        return "quantized"
    if not isinstance(call.kv, DenseKV):
        return type(call.kv).__name__
    if not call.kv.is_plain:
        return "ring"
    even = call.kv_lens is None and isinstance(call.q_offset, int)
    return "dense" if even else "kv_lens"
