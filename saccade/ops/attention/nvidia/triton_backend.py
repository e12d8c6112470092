"""Backend `triton`: Triton kernels on NVIDIA GPUs from Ampere on, over every view.

Prefill, decoding (split-KV), gradients, quantized keys.  This module is loaded on any machine, so
it imports Triton only to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, GrowingKV, PagedKV, QuantizedKV, RaggedKV
from saccade.ops.attention.call import MANY_QUERIES, AttentionCall, dtype_refusal
from saccade.ops.attention.nvidia import chunked
from saccade.ops.attention.nvidia.problem import dense_problem
from saccade.ops.attention.nvidia.replayed import replayed
from saccade.ops.gpu.kernel_args import MAX_SPANS
from saccade.ops.gpu.support import triton_refusal

MAX_DIM = 512
MAX_LATENT = 576  # channels of keys that decoding reads in two pieces; values have up to MAX_DIM

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def refusal(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    missing = triton_refusal(call.q.device)
    if missing is not None:
        return missing
    if call.q.dtype not in _FLOATS:
        return f"{call.q.dtype} is not one of float32, bfloat16, float16"
    differ = dtype_refusal(call)
    if differ is not None:
        return differ
    if max(call.kv.shape[3:]) > MAX_DIM and not _is_wide_decoding(call):
        return (
            f"head_dim {max(call.kv.shape[3:])} is above {MAX_DIM} (up to {MAX_LATENT} for keys of "
            f"at most {MANY_QUERIES} queries in 16 bits, without gradients)"
        )
    if call.needs_grad and call.alibi_slopes is not None and call.alibi_slopes.requires_grad:
        return "alibi_slopes get no gradient"
    return _view_refusal(call)


def _is_wide_decoding(call: AttentionCall) -> bool:
    """Whether few queries read keys of up to MAX_LATENT channels, which are cut into two pieces."""
    dim, value_dim = call.kv.shape[3:]
    few = call.q.shape[2] <= MANY_QUERIES and call.cu_seqlens is None and not call.needs_grad
    stored = isinstance(call.kv, DenseKV | PagedKV | RaggedKV) and call.q.dtype != torch.float32
    return few and stored and dim <= MAX_LATENT and value_dim <= MAX_DIM


def _view_refusal(call: AttentionCall) -> str | None:
    kv = call.kv
    plain = isinstance(kv, DenseKV) and kv.is_plain
    if call.needs_grad and not plain:
        return "only plain dense keys have a gradient"
    if isinstance(kv, DenseKV) and len(kv.spans) > MAX_SPANS:
        return f"the view has {len(kv.spans)} spans, more than {MAX_SPANS}"
    extras = (call.key_padding, call.blocks, call.attn_mask)
    if isinstance(kv, RaggedKV) and any(extra is not None for extra in extras):
        return "a ragged view takes no key_padding, blocks or attn_mask"
    if isinstance(kv, GrowingKV):
        if any(extra is not None for extra in extras) or call.mask.sinks or call.kv_lens is None:
            return "a growing view takes kv_lens, and no sinks, key_padding, blocks or attn_mask"
        kv = kv.stored
    if isinstance(kv, QuantizedKV):
        if kv.k_group % 16 or any(dim % 8 for dim in kv.shape[3:]):
            return f"quantized keys need groups of 16 n, got {kv.k_group}, and heads of 8 n"
    elif not isinstance(kv, (DenseKV, PagedKV, RaggedKV)):
        return f"it does not support views of type {type(kv).__name__}"
    return None


def run(call: AttentionCall) -> AttentionOutput:
    """Attention by the kernel that suits the call: prefill, decoding, or prefill by chunks."""
    return replayed(call, "triton", _run)


def _run(call: AttentionCall) -> AttentionOutput:
    call = call.in_query_dtype()
    many = call.q.shape[2] > MANY_QUERIES
    if isinstance(call.kv, DenseKV) and call.kv.is_plain:
        if many or call.cu_seqlens is not None:
            return _prefill(call)
    elif many and chunked.suits(call):
        return chunked.run(call, _prefill)
    from saccade.ops.attention.nvidia.triton.views import attend_view

    return attend_view(call)


def forward(call: AttentionCall) -> AttentionOutput:
    """Output and lse of a call over plain dense keys, as `backward` needs them."""
    from saccade.ops.attention.nvidia.triton import launch

    if _is_wide_decoding(call) and call.kv.shape[3] > MAX_DIM:
        return _run(call)
    return launch.forward(dense_problem(call))


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta): the same bits every time."""
    from saccade.ops.attention.nvidia.triton import launch

    return launch.backward(dense_problem(call), out, lse, dout, dlse)


def _prefill(call: AttentionCall) -> AttentionOutput:
    from saccade.ops.attention.nvidia.triton import launch

    problem = dense_problem(call)
    # Laid out as the queries are, which models transpose into rows of tokens without a copy.
    same = problem.q.shape[3] == problem.v.shape[3]
    return launch.forward(problem, torch.empty_like(problem.q) if same else None)
