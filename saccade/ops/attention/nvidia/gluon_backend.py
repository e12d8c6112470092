"""Backend `gluon`: warp-specialized Gluon kernels on Hopper GPUs.

Five kinds of call, each with its own kernel and its own reasons to refuse: gradients, decoding over
quantized keys, decoding over dense keys or pages, prefill over rings and quantized keys chunk by
chunk, and prefill over dense keys or pages.  This module is loaded on any machine, so it imports
Triton only to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput, PagedKV
from saccade.ops.attention.call import MANY_QUERIES, AttentionCall
from saccade.ops.attention.nvidia import chunked
from saccade.ops.attention.nvidia.gluon.backward import support as backward_support
from saccade.ops.attention.nvidia.gluon.decode import support as decode_support
from saccade.ops.attention.nvidia.gluon.prefill import support as prefill_support
from saccade.ops.attention.nvidia.gluon.quantized_decode import support as quantized_support
from saccade.ops.attention.nvidia.problem import dense_problem, paged_kv_lens, problem_of
from saccade.ops.attention.nvidia.replayed import replayed
from saccade.ops.gpu.support import gluon_refusal


def refusal(call: AttentionCall) -> str | None:
    """Why the kernels cannot run this call, or None."""
    if torch.compiler.is_compiling() and call.is_plain_storage:
        return None  # becomes an operator, which checks again when it runs
    reason = gluon_refusal(call.q.device)
    if reason is not None:
        return reason
    if call.needs_grad:
        return backward_support.refusal(call)
    if _is_chunked(call):
        return prefill_support.chunked_refusal(call)
    if quantized_support.reads(call.kv):
        return quantized_support.refusal(call)
    if decode_support.reads(call):
        return decode_support.refusal(call)
    return prefill_support.refusal(call)


def _is_chunked(call: AttentionCall) -> bool:
    """Whether a prompt goes over a ring or quantized keys."""
    return call.q.shape[2] > MANY_QUERIES and not call.is_plain_storage and chunked.suits(call)


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts."""
    return replayed(call, "gluon", _run)


def _run(call: AttentionCall) -> AttentionOutput:
    if _is_chunked(call):
        return chunked.run(call, _prefill)
    if quantized_support.reads(call.kv):
        return quantized_support.run(call)
    if decode_support.reads(call):
        return decode_support.run(call)
    return _prefill(call)


def forward(call: AttentionCall) -> AttentionOutput:
    """Output and lse of a call over plain dense keys, as `backward` needs them."""
    from saccade.ops.attention.nvidia.gluon.prefill import launch

    return launch.forward(dense_problem(call))


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta); dq is summed in no fixed order."""
    from saccade.ops.attention.nvidia.gluon.backward import launch

    return launch.backward(dense_problem(call), out, lse, dout, dlse)


def _prefill(call: AttentionCall) -> AttentionOutput:
    from saccade.ops.attention.nvidia.gluon.prefill import launch

    kv = call.kv
    out = _empty_output(call.q, kv.shape[4])
    if isinstance(kv, PagedKV):
        problem = problem_of(call, kv.k, kv.v, paged_kv_lens(call))
        return launch.forward(problem, page_table=kv.page_table, out=out)
    return launch.forward(dense_problem(call), out=out)


def _empty_output(q: Tensor, value_dim: int) -> Tensor:
    """Laid out as the queries are, which models transpose into rows of tokens without a copy."""
    if value_dim == q.shape[3]:
        return torch.empty_like(q)
    batch, heads, queries, _ = q.shape
    if q.transpose(1, 2).is_contiguous():
        return q.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    return q.new_empty(batch, heads, queries, value_dim)
