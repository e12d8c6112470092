"""Attention by a warp-specialised Gluon kernel on Hopper GPUs: prefill over dense keys or pages.

This module is what the chooser loads, on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

import torch

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.decode import support as gluon_decode
from saccade.ops.attention.nvidia.gluon.quantized_decode import support as gluon_codes
from saccade.ops.attention.nvidia.gluon.support import layout_refusal, score_refusal
from saccade.ops.gpu.support import gluon_refusal

KEYS = {64: 128, 128: 128, 256: 64}  # keys of a tile, by head dimension
DIMS = tuple(KEYS)
SHORTEST_PAGE = 16


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call, or None."""
    reason = gluon_refusal(call.q.device)
    if reason is not None:
        return reason
    if gluon_codes.reads(call.kv):
        return gluon_codes.refusal(call)
    if gluon_decode.reads(call):
        return gluon_decode.refusal(call)
    return _problem_refusal(call) or _layout_refusal(call)


def _problem_refusal(call: AttentionCall) -> str | None:
    """What the kernel does not compute."""
    kv = call.kv
    if not isinstance(kv, PagedKV) and not (isinstance(kv, DenseKV) and kv.is_plain):
        return "it knows plain dense keys and pages, and no other view"
    if call.key_padding is not None or call.attn_mask is not None:
        return "it knows no key_padding and no attn_mask"
    return score_refusal(call) or _page_refusal(call) or _blocks_refusal(call)


def _page_refusal(call: AttentionCall) -> str | None:
    """A tile of keys has to be whole pages, or to lie in one."""
    dim = call.q.shape[3]
    if not isinstance(call.kv, PagedKV) or dim not in DIMS:
        return None
    keys, size = KEYS[dim], call.kv.page_size
    if (keys % size and size % keys) or size < SHORTEST_PAGE:
        return (
            f"pages of {size} keys are shorter than {SHORTEST_PAGE}, or neither divide its "
            f"tiles of {keys} nor are multiples of them"
        )
    return None


def _blocks_refusal(call: AttentionCall) -> str | None:
    """A tile has to lie in one block of a selection."""
    blocks, dim = call.blocks, call.q.shape[3]
    if blocks is None or dim not in DIMS:
        return None
    if not call.with_(blocks=None).is_plain or not isinstance(call.kv, DenseKV):
        return "it selects blocks of plain dense keys only, the same number for every row"
    keys = KEYS[dim]
    if blocks.q_block % 128 or blocks.k_block % keys:
        return (
            f"blocks of {blocks.q_block} queries x {blocks.k_block} keys are no multiples of "
            f"its tiles of 128 x {keys}"
        )
    return None


def _layout_refusal(call: AttentionCall) -> str | None:
    """What the copy engine and the matrix units do not take."""
    assert isinstance(call.kv, (DenseKV, PagedKV))
    tensors = (call.q, call.kv.k, call.kv.v)
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"{call.q.dtype} is not one of bfloat16, float16"
    if any(x.dtype != call.q.dtype for x in tensors):
        return f"q is {call.q.dtype} but keys are {call.kv.dtype}"
    if call.kv.shape[2] == 0:
        return "there are no keys"
    return layout_refusal(tensors, DIMS)


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts."""
    if gluon_codes.reads(call.kv):
        return gluon_codes.run(call)
    if gluon_decode.reads(call):
        return gluon_decode.run(call)
    from saccade.ops.attention.nvidia.gluon.prefill.launch import forward
    from saccade.ops.attention.nvidia.problem import dense_problem, paged_kv_lens, problem_of

    kv = call.kv
    # Laid out as the queries are, which models turn into rows of tokens without a copy.
    out = torch.empty_like(call.q)
    if not isinstance(kv, PagedKV):
        return forward(dense_problem(call), out=out)
    problem = problem_of(call, kv.k, kv.v, paged_kv_lens(call))
    return forward(problem, page_table=kv.table, out=out)
