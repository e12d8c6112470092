"""The C++ kernels as operators of torch.library: gradients, fake tensors, torch.compile.

The forward operator saves its output and lse; the backward one recomputes the scores tile by tile
(csrc/backward.h), so memory stays linear in the length.  Both take plain tensors and numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, Mask
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.cpu import backend as cpu

_KEYS_PER_CHUNK = 512  # fewer are not worth another buffer for dq
_PIECES_PER_THREAD = 4


def run(call: AttentionCall) -> AttentionOutput:
    """Attention over plain keys, differentiable in q, k, v and sink_logits."""
    if not isinstance(call.kv, DenseKV) or call.blocks is not None or call.attn_mask is not None:
        return cpu.compute(call)
    by_row = isinstance(call.q_offset, Tensor)
    cu_q, cu_k = (None, None) if call.cu_seqlens is None else call.cu_seqlens
    out, lse = attention(
        call.q,
        call.kv.k,
        call.kv.v,
        call.mask.causal,
        call.mask.window,
        call.mask.sinks,
        call.scale,
        call.softcap,
        0 if by_row else call.q_offset,  # type: ignore[arg-type]
        call.q_offset if by_row else None,  # type: ignore[arg-type]
        call.sink_logits,
        call.alibi_slopes,
        call.key_padding,
        call.kv_lens,
        cu_q,
        cu_k,
    )
    return AttentionOutput(out, lse)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    sinks: int,
    scale: float,
    softcap: float | None,
    q_offset: int,
    q_offsets: Tensor | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_padding: Tensor | None,
    kv_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> AttentionCall:
    return AttentionCall(
        q=q,
        kv=DenseKV(k, v),
        mask=Mask(causal=causal, window=window, sinks=sinks),
        scale=scale,
        softcap=softcap,
        q_offset=q_offset if q_offsets is None else q_offsets,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        key_padding=key_padding,
        kv_lens=kv_lens,
        cu_seqlens=None if cu_q is None or cu_k is None else (cu_q, cu_k),
    )


@torch.library.custom_op("saccade::cpu_attention", mutates_args=(), device_types="cpu")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    sinks: int,
    scale: float,
    softcap: float | None,
    q_offset: int,
    q_offsets: Tensor | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_padding: Tensor | None,
    kv_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one call over plain keys."""
    options = (causal, window, sinks, scale, softcap, q_offset, q_offsets, sink_logits)
    extras = (alibi_slopes, key_padding, kv_lens, cu_q, cu_k)
    return tuple(cpu.compute(_call(q, k, v, *options, *extras)))  # type: ignore[return-value]


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("saccade::cpu_attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    d_out: Tensor,
    delta: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    sinks: int,
    scale: float,
    softcap: float | None,
    q_offset: int,
    q_offsets: Tensor | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_padding: Tensor | None,
    kv_lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); `delta` is rowsum(d_out * out) less the gradient of the lse."""
    options = (causal, window, sinks, scale, softcap, q_offset, q_offsets, sink_logits)
    extras = (alibi_slopes, key_padding, kv_lens, cu_q, cu_k)
    call = cpu.in_kernel_form(_call(q, k, v, *options, *extras))
    batch, heads, q_len, dim = q.shape
    padded = -(-dim // 32) * 32
    chunks = _num_chunks(k, 1 if cu_q is None else cu_q.shape[0] - 1)
    dq = torch.zeros(chunks, batch, heads, q_len, padded)
    dk, dv = (torch.zeros(x.shape, dtype=x.dtype) for x in (k, v))
    d_out, delta = d_out.contiguous(), delta.contiguous()
    gradients = tuple(cpu.record(x) for x in (d_out, delta, dq, dk, dv))
    kernels = cpu.extension()
    assert kernels is not None
    kernels.attend_backward(*cpu.arguments(call, out, lse), gradients)
    return dq[..., :dim].sum(0).mul_(scale).to(q.dtype), dk, dv


def _num_chunks(k: Tensor, documents: int) -> int:
    """Parts of the keys, enough for all threads: shapes and the thread count alone decide."""
    threads = torch.get_num_threads()
    pieces = max(1, k.shape[0] * k.shape[1] * documents)
    wanted = -(-threads * _PIECES_PER_THREAD // pieces) if threads > 1 else 1
    return max(1, min(wanted, k.shape[2] // _KEYS_PER_CHUNK))


@attention_backward.register_fake
def _(d_out: Tensor, delta: Tensor, out: Tensor, lse: Tensor, *inputs: object) -> object:
    return tuple(x.new_empty(x.shape) for x in inputs[:3] if isinstance(x, Tensor))


_SINK = 10  # place of sink_logits among the arguments of the forward operator


def _save(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x if isinstance(x, Tensor) else None for x in inputs]
    ctx.save_for_backward(*output, *tensors)  # type: ignore[attr-defined]
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]  # type: ignore[attr-defined]


def _differentiate(ctx: object, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    inputs = [
        number if tensor is None else tensor
        for tensor, number in zip(tensors, ctx.numbers, strict=True)  # type: ignore[attr-defined]
    ]
    delta = (d_out.float() * out.float()).sum(-1) - d_lse
    gradients = attention_backward(d_out, delta, out, lse, *inputs)
    rest: list[Tensor | None] = [None] * (len(inputs) - 3)
    sink = inputs[_SINK]
    if sink is not None:  # the sink has weight exp(sink - lse) and a value of 0
        weight = (sink.float()[None, :, None] - lse).exp()
        rest[_SINK - 3] = -(weight * delta).sum((0, 2)).to(sink.dtype)
    return (*gradients, *rest)


attention.register_autograd(_differentiate, setup_context=_save)
