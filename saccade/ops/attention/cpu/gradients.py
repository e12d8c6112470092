"""Gradients by the C++ kernels, which recompute scores from the lse (csrc/backward.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.cpu.binding import arguments, extension, in_kernel_form, record

_KEYS_PER_CHUNK = 512  # fewer are not worth another buffer for dq
_CHUNKS_PER_THREAD = 4
_DQ_ALIGNMENT = 32  # floats, for every SIMD width


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta) of a call over plain keys; delta: rowsum(dout * out) - dlse `[B, H, Lq]`.

    The result does not depend on how threads are scheduled.
    """
    call = in_kernel_form(call)
    k, v = call.kv.k, call.kv.v  # type: ignore[attr-defined]
    batch, heads, q_len, dim = call.q.shape
    delta = (dout.float() * out.float()).sum(-1) - dlse
    padded = -(-dim // _DQ_ALIGNMENT) * _DQ_ALIGNMENT
    sequences = 1 if call.cu_seqlens is None else call.cu_seqlens[0].shape[0] - 1
    chunks = _num_chunks(k, sequences)
    dq = call.q.new_zeros(chunks, batch, heads, q_len, padded, dtype=torch.float32)
    dk, dv = (x.new_zeros(x.shape) for x in (k, v))
    dout, delta = dout.contiguous(), delta.contiguous()
    gradients = tuple(record(x) for x in (dout, delta, dq, dk, dv))
    kernels = extension()
    assert kernels is not None, "the backend refuses calls without its extension"
    kernels.attend_backward(*arguments(call, out, lse), gradients)
    return dq[..., :dim].sum(0).mul_(call.scale).to(call.q.dtype), dk, dv, delta


def _num_chunks(k: Tensor, sequences: int) -> int:
    """Parts of the keys, enough for all threads: shapes and the thread count alone decide."""
    threads = torch.get_num_threads()
    work = max(1, k.shape[0] * k.shape[1] * sequences)
    wanted = -(-threads * _CHUNKS_PER_THREAD // work) if threads > 1 else 1
    return max(1, min(wanted, k.shape[2] // _KEYS_PER_CHUNK))
