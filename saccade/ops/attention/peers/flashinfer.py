"""Backend `flashinfer`: FlashInfer's attention of one request, which it compiles when needed.

Its functions for batches, packed sequences and pages read lengths on the host, which would wait
for the GPU in every call, so only a batch of one row goes there.
"""

from __future__ import annotations

import math

from saccade.core import AttentionOutput
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.peers import installed
from saccade.ops.attention.peers.problem import (
    Pattern,
    forward_of,
    needs_lse,
    pattern_of,
    peer_call,
    result,
    shared_refusal,
)

MODULE = "flashinfer"
HEAD_DIMS = (64, 128, 256)
CAPABILITIES = (installed.AMPERE, (12, 1))


def refusal(call: AttentionCall) -> str | None:
    """Why FlashInfer cannot run this call, or None."""
    reason = installed.refusal(call.q.device, CAPABILITIES, "flashinfer", MODULE)
    if reason is not None:
        return reason
    return shared_refusal(call) or _own_refusal(call) or installed.import_refusal(MODULE)


def _own_refusal(call: AttentionCall) -> str | None:
    pattern, kv = pattern_of(call), call.kv
    if call.needs_grad:
        return "it has no gradients"
    if call.q.shape[0] != 1 or call.cu_seqlens is not None:
        return "it takes a batch of one row and no packed sequences here"
    if kv.shape[3] not in HEAD_DIMS or kv.shape[4] != kv.shape[3]:
        return f"head_dim {kv.shape[3]} is not one of {', '.join(map(str, HEAD_DIMS))} for k and v"
    if call.alibi_slopes is not None:
        return "its ALiBi has slopes of its own"
    assert isinstance(pattern, Pattern)
    if pattern.causal and call.q.shape[2] > kv.shape[2]:
        return "it takes no more queries than keys under a causal mask"
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """Attention by FlashInfer, whose lse is a logarithm to base 2, tokens first."""
    module, given = installed.load(MODULE), peer_call(call)
    found = module.single_prefill_with_kv_cache(
        given.q[0],
        given.k[0],
        given.v[0],
        causal=given.pattern.causal,
        kv_layout="NHD",
        sm_scale=call.scale,
        window_left=given.pattern.left,
        logits_soft_cap=call.softcap,
        return_lse=needs_lse(call),
    )
    if not needs_lse(call):
        return result(call, found, None)
    out, lse = found
    return result(call, out, lse.T * math.log(2))


forward = forward_of(run)
