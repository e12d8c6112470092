"""Backend `fa4`: FlashAttention-4 (package flash-attn-4), whose kernels are compiled when needed.

The first call of a kind compiles its kernel, which takes seconds.
"""

from __future__ import annotations

import torch

from saccade.core import AttentionOutput
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.peers import installed
from saccade.ops.attention.peers.problem import (
    dims_refusal,
    forward_of,
    needs_lse,
    peer_call,
    result,
    shared_refusal,
)
from saccade.ops.gpu.launching import on

MODULE = "flash_attn.cute"
WIDTHS = ((192, 128), (128, 64))  # of keys and values, where they differ, in its own tests


def refusal(call: AttentionCall) -> str | None:
    """Why FlashAttention-4 cannot run this call, or None."""
    capabilities = (installed.HOPPER, installed.HOPPER)
    where = ("flash_attn", "cute/interface.py")
    reason = installed.refusal(call.q.device, capabilities, "flash-attn-4", *where)
    if reason is not None:
        return reason
    reason = shared_refusal(call, lse_gradient=True) or dims_refusal(call) or _own_refusal(call)
    return reason or installed.import_refusal(MODULE)


def _own_refusal(call: AttentionCall) -> str | None:
    dims = call.kv.shape[3], call.kv.shape[4]
    if dims[0] != dims[1] and (call.needs_grad or dims not in WIDTHS):
        return f"it takes no values of {dims[1]} channels beside keys of {dims[0]} here"
    return None if call.alibi_slopes is None else "it has no ALiBi"


def run(call: AttentionCall) -> AttentionOutput:
    """Attention by FlashAttention-4; gradients, those of the lse too, by its own backward pass."""
    module, given = installed.load(MODULE), peer_call(call)
    options = given.options() | {
        "return_lse": needs_lse(call),
        "deterministic": call.needs_grad and torch.are_deterministic_algorithms_enabled(),
    }
    with on(call.q.device):
        if given.cu_q is None:
            out, lse = module.flash_attn_func(given.q, given.k, given.v, **options)
        else:
            options |= given.lengths()
            out, lse = module.flash_attn_varlen_func(given.q, given.k, given.v, **options)
    return result(call, out, lse)


forward = forward_of(run)
