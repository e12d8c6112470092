"""Attention with gradients as operators of torch.library, for autograd and torch.compile.

Calls over plain dense keys that train, or that torch.compile traces, go through the operator
`saccade::attention` whatever the backend.  An operator takes tensors and plain numbers, so a call
is flattened in the order of `_SCHEMA`.  The backend is passed by name; "auto" is resolved by
`dispatch` when the operator runs, with the tensors that it then gets, so a compiled model runs the
kernels that an eager one runs.

Calling through torch.library costs the host several times what the kernels of a short sequence
take on the GPU.  So an eager call, where neither a compiler nor a dispatch mode needs to see an
operator, runs the same functions as a plain `torch.autograd.Function`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.core import AttentionOutput, BlockSelection, DenseKV, Mask
from saccade.ops.attention import dispatch
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.first_order import FirstOrder
from saccade.ops.attention.watch import is_transformed, is_watched
from saccade.ops.planning import planning

_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sink_logits, Tensor? alibi_slopes, "
    "Tensor? key_padding, Tensor? kv_lens, Tensor? q_offsets, Tensor? cu_q, Tensor? cu_k, "
    "Tensor? block_mask, Tensor? attn_mask, bool causal, SymInt? window, SymInt sinks, "
    "float scale, float? softcap, SymInt q_offset, SymInt q_block, SymInt k_block, "
    "bool wants_lse, bool training, str backend"
)
_SINK_LOGITS = 3  # their place in the schema


def needed(call: AttentionCall, backend: dispatch.Backend) -> bool:
    """Whether a call has to run as an operator: it trains or is watched, by a backend that can."""
    if not call.needs_grad and (planning() or not is_watched(call.floats)):
        return False
    return dispatch.is_operator(call) and hasattr(backend, "backward")


def run(call: AttentionCall, backend: str) -> AttentionOutput:
    """Attention over plain dense keys, differentiable in q, k, v and sink_logits."""
    flat = flatten(call, backend)
    apply = attention if is_watched(flat) else _Eager.apply
    return AttentionOutput(*apply(*flat))


def flatten(call: AttentionCall, backend: str) -> tuple[Any, ...]:
    """The arguments of the operator, in the order of its schema."""
    assert isinstance(call.kv, DenseKV)
    blocks, offset = call.blocks, call.q_offset
    cu_q, cu_k = (None, None) if call.cu_seqlens is None else call.cu_seqlens
    by_row = isinstance(offset, Tensor)
    return (
        call.q,
        call.kv.k,
        call.kv.v,
        call.sink_logits,
        call.alibi_slopes,
        call.key_padding,
        call.kv_lens,
        offset if by_row else None,
        cu_q,
        cu_k,
        None if blocks is None else blocks.allowed,
        call.attn_mask,
        call.mask.causal,
        call.mask.window,
        call.mask.sinks,
        call.scale,
        call.softcap,
        0 if by_row else offset,
        1 if blocks is None else blocks.q_block,
        1 if blocks is None else blocks.k_block,
        call.wants_lse,
        call.needs_grad,
        backend,
    )


def _call_of(flat: tuple[Any, ...]) -> AttentionCall:
    """The call that `flatten` was given; `training` is an argument, not read from its tensors."""
    q, k, v, sinks, slopes, padding, kv_lens, offsets, cu_q, cu_k, block_mask, attn_mask = flat[:12]
    causal, window, num_sinks, scale, softcap, offset, q_block, k_block = flat[12:20]
    blocks = None
    if block_mask is not None:
        blocks = BlockSelection(allowed=block_mask, q_block=q_block, k_block=k_block)
    return AttentionCall(
        q=q,
        kv=DenseKV(k, v),
        mask=Mask(causal=causal, window=window, sinks=num_sinks),
        scale=scale,
        q_offset=offset if offsets is None else offsets,
        softcap=softcap,
        sink_logits=sinks,
        alibi_slopes=slopes,
        key_padding=padding,
        kv_lens=kv_lens,
        cu_seqlens=None if cu_q is None else (cu_q, cu_k),
        blocks=blocks,
        attn_mask=attn_mask,
        wants_lse=flat[20],
        training=flat[21],
    )


def _forward(*flat: Any) -> tuple[Tensor, Tensor]:
    call = _call_of(flat)
    return tuple(dispatch.forward(call, flat[-1]))  # type: ignore[return-value]


def _backward(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, *flat: Any) -> Any:
    call = _call_of(flat)
    return dispatch.differentiable(call, flat[-1]).backward(call, out, lse, dout, dlse)


def _checked_forward(*flat: Any) -> tuple[Tensor, Tensor]:
    """`_forward` in a traced graph, where a named backend has not checked the real tensors yet."""
    if flat[-1] != "auto":
        dispatch.choose(_call_of(flat), flat[-1])
    return _forward(*flat)


attention = torch.library.custom_op(
    "saccade::attention",
    _checked_forward,
    mutates_args=(),
    schema=f"({_SCHEMA}) -> (Tensor, Tensor)",
)
attention_backward = torch.library.custom_op(
    "saccade::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor out, Tensor lse, Tensor dout, Tensor dlse, {_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@attention.register_fake
def _(*flat: Any) -> tuple[Tensor, Tensor]:
    q, v = flat[0], flat[2]
    shape = q.shape[:3]
    return q.new_empty(*shape, v.shape[3]), q.new_empty(shape, dtype=torch.float32)


@attention_backward.register_fake
def _(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, *flat: Any) -> Any:
    return (*(x.new_empty(x.shape) for x in flat[:3]), torch.empty_like(lse))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]


def _gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    return _gradients_by(attention_backward, ctx, dout, dlse)


def _gradients_by(backward: Any, ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    """Gradients of all arguments; `backward` is the operator, or the function behind it."""
    *tensors, out, lse = ctx.saved_tensors
    saved = iter(tensors)
    pairs = zip(ctx.is_tensor, ctx.numbers, strict=True)
    flat = [next(saved) if is_tensor else number for is_tensor, number in pairs]
    with torch.no_grad():
        dq, dk, dv, delta = backward(out, lse, dout, dlse, *flat)
        sinks, dsinks = flat[_SINK_LOGITS], None
        if sinks is not None:
            # A sink has a weight exp(sink - lse) and no value: its score gradient is
            # -weight * delta.
            weight = (sinks.float()[None, :, None] - lse).exp().nan_to_num(0.0)
            dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    found = (dq, dk, dv, dsinks)
    if torch.is_grad_enabled():  # create_graph: somebody may differentiate them again
        sources = (dout, dlse, *(x for x in flat[: _SINK_LOGITS + 1] if x is not None))
        found = tuple(None if x is None else FirstOrder.apply(x, *sources) for x in found)
    return (*found, *[None] * (len(flat) - 4))


attention.register_autograd(_gradients, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator as an autograd.Function, without the torch.library dispatch."""

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return _forward(*flat)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        mapped = is_transformed(dout) or is_transformed(dlse)  # by is_grads_batched or vectorize
        return _gradients_by(attention_backward if mapped else _backward, ctx, dout, dlse)
