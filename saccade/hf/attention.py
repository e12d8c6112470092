"""The attention function that transformers calls for `attn_implementation="saccade"`.

It converts what transformers passes (tensors or our handle; a SpecMask, another mask or none) to
the arguments of `saccade.ops.attend`, and returns `[B, Lq, Hq, Dv]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from saccade.cache import Cursor
from saccade.core import DenseKV, KVView, Mask, Unsupported
from saccade.hf.attention_weights import wants_weights, weights_of
from saccade.hf.deferred_rope import materialize
from saccade.hf.dense_mask import boolean_mask, check_values
from saccade.hf.extra_arguments import check_arguments
from saccade.hf.handle import KVHandle, check_window, paired
from saccade.hf.mask import SpecMask, is_traced
from saccade.hf.packing import packed_seqlens, same_sequence
from saccade.hf.settings import AttentionSettings, settings_of
from saccade.ops import AttentionCall, attend, make_call
from saccade.sparse.pattern import selected, selected_in_step


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionArgs:
    """What is attended to: the view of the keys, the position of the queries, and the mask.

    Positions count from the first key of the view, so `q_offset` and `mask` refer to the view.
    `summaries` are what a cache keeps of the blocks of its keys; in a step all memory of them.
    """

    kv: KVView
    q_offset: int | Tensor
    mask: Mask
    key_padding: Tensor | None = None
    kv_lens: Tensor | None = None
    attn_mask: Tensor | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None
    summaries: Tensor | None = None


def saccade_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, as transformers calls it: ([B, Lq, Hq, Dv] contiguous, weights).

    The weights `[B, Hq, Lq, Lk]` are made only for output_attentions=True, else None.

    Args:
        query: `[B, Hq, Lq, D]`, RoPE applied.
        key, value: `[B, Hkv, Lk, D]` and `[.., Dv]`, or the handles of a SaccadeCache.
        attention_mask: a SpecMask, a 4-D mask (bool, or 0 / -inf), a 2-D padding mask, or None.
        s_aux: `[Hq]`, learned logits in the denominator (gpt-oss).

    Raises:
        Unsupported: dropout, or attention that is no softmax over visible keys.
    """
    check_arguments(module, dropout, kwargs)
    own = _own_mask(module, is_causal, sliding_window)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    scores = {"scale": scale, "softcap": softcap, "sink_logits": s_aux}
    if isinstance(attention_mask, SpecMask):
        attention_mask = attention_mask.in_force()
    caches = isinstance(key, KVHandle) and torch.compiler.is_compiling()
    attended = _outside_graphs if caches else _attended
    return attended(module, query, key, value, attention_mask, own, scores, kwargs)


def _attended(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVHandle,
    value: Tensor | KVHandle,
    attention_mask: Tensor | None,
    own: Mask,
    scores: dict[str, Any],
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """See `saccade_attention`; `scores` says how they are computed."""
    query, settings, observe = materialize(query), settings_of(module), None
    key, value = paired(key, value)
    if isinstance(key, KVHandle):
        settings, observe = key.settings or settings, key.observe
        args = _from_handle(query, key, attention_mask, own)
    else:
        assert isinstance(value, Tensor)
        args = _from_tensors(query, DenseKV(key, value), attention_mask, own, settings, kwargs)
    args = _narrowed(args, settings)
    if isinstance(key, KVHandle) and isinstance(key.view, DenseKV):
        _check_kept(key.view, args)
    call = _call(query, args, settings, {**scores, "wants_lse": observe is not None})
    if observe is None:
        result = attend(call, backend=settings.backend)
    else:
        result = observe(call, settings.backend)
    weights = weights_of(module, call, key.shape[2]) if wants_weights(module, kwargs) else None
    return result.out.transpose(1, 2).contiguous(), weights


_outside_graphs = cast(Any, torch.compiler.disable)(_attended)
"""Over our caches, which decide on the host what to store where: one graph break a layer."""


def _own_mask(module: nn.Module, is_causal: bool | None, window: Any) -> Mask:
    """The mask that the model itself implies; used where transformers passes none.

    A window that is no number of keys (None, 0, -1) is none, as for transformers' own masks.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    narrows = causal and isinstance(window, int) and window > 0
    return Mask(causal=causal, window=window if narrows else None)


def _call(
    query: Tensor,
    args: AttentionArgs,
    settings: AttentionSettings,
    options: dict[str, Any],
) -> AttentionCall:
    """The call of the operator; `options` are those of the scores and `wants_lse`."""
    blocks = None
    if settings.sparse is not None:
        if not args.mask.causal and args.attn_mask is None:
            raise Unsupported(
                "sparse patterns choose among earlier keys, but this layer attends to later keys "
                "too. Leave sparse out for this model."
            )
        if isinstance(args.q_offset, int):
            blocks = selected(
                settings.sparse, query, args.kv, args.q_offset,
                rows=args.summaries, padding=args.key_padding,
            )  # fmt: skip
        else:
            blocks = selected_in_step(
                settings.sparse, query, args.kv, args.q_offset, args.summaries
            )
    return make_call(
        query,
        args.kv,
        mask=args.mask,
        key_padding=args.key_padding,
        kv_lens=args.kv_lens,
        cu_seqlens=args.cu_seqlens,
        attn_mask=args.attn_mask,
        q_offset=None if args.cu_seqlens is not None else args.q_offset,
        blocks=blocks,
        **options,
    )


def _from_handle(
    query: Tensor, handle: KVHandle, attention_mask: Tensor | None, own: Mask
) -> AttentionArgs:
    """A call on one of our caches: the view has the positions of its keys."""
    if handle.cursor is not None:
        return _from_step(handle, handle.cursor, attention_mask, own)
    end = handle.shape[2]
    offset, rows = end - query.shape[2], handle.summaries
    args = AttentionArgs(kv=handle.view, q_offset=offset, mask=own, summaries=rows)
    if isinstance(attention_mask, SpecMask):
        spec = attention_mask.spec
        _check_length(attention_mask.shape[3] + spec.kv_offset, handle.seen)
        args = replace(args, mask=spec.mask, key_padding=_moved(spec.padding, query))
    elif attention_mask is not None:
        attn_mask = boolean_mask(attention_mask, query, handle.seen)
        if attn_mask.ndim == 2:
            args = replace(args, key_padding=attn_mask)
        else:
            args = replace(args, mask=Mask(causal=False), attn_mask=attn_mask)
    if args.attn_mask is None:
        check_window(handle, args.mask.window)
    padded = args.key_padding is not None or args.attn_mask is not None
    if end != handle.seen and (padded or args.mask.window is not None):
        raise Unsupported(
            f"a compressed cache ({end} keys kept of {handle.seen} tokens) does not store which "
            "slot belongs to which token, so padding, 4-D masks and windows cannot be applied. "
            "Run unpadded rows, or set no kv_policy."
        )
    return args


def _from_step(
    handle: KVHandle, cursor: Cursor, attention_mask: Tensor | None, own: Mask
) -> AttentionArgs:
    """A call of a decoding step: the positions are tensors on the device."""
    mask = own
    if isinstance(attention_mask, SpecMask) and attention_mask.spec.padding is None:
        mask = attention_mask.spec.mask
    elif attention_mask is not None:
        raise Unsupported("a decoding step takes no padding and no 4-D mask: run unpadded rows.")
    return AttentionArgs(
        kv=handle.view, q_offset=cursor.start, mask=mask, kv_lens=cursor.stop,
        summaries=handle.summaries,
    )  # fmt: skip


def _check_kept(view: DenseKV, args: AttentionArgs) -> None:
    """Raise where a mask shows keys that a ring has overwritten."""
    if view.is_plain or not isinstance(args.q_offset, int):
        return
    window, ends = args.mask.window, [0, *(span.position + span.length for span in view.spans)]
    for start, span in zip(ends, view.spans, strict=False):
        gone = range(start, span.position)
        if args.mask.causal and window is not None:  # first of those that the first query needs
            gone = gone[max(0, args.q_offset - window + 1 - start) :]
        if not gone:
            continue
        if args.attn_mask is None or args.attn_mask[..., gone.start : gone.stop].any():
            raise Unsupported(
                f"the attention mask shows the keys {gone.start} to {gone.stop - 1}, which this "
                "layer's cache no longer holds: the config gives it a sliding window. Leave the "
                "mask out, or use past_key_values=DynamicCache() of transformers."
            )


def _from_tensors(
    query: Tensor,
    kv: DenseKV,
    attention_mask: Tensor | None,
    own: Mask,
    settings: AttentionSettings,
    kwargs: dict[str, Any],
) -> AttentionArgs:
    """A call on plain tensors: no cache, or one of transformers'."""
    q_len, kv_len = query.shape[2], kv.k.shape[2]
    if settings.needs_own_cache and kv_len != q_len:
        raise Unsupported(
            "the options in force (of storage, compression or checkpoints) need saccade's caches, "
            "but the keys came from a cache of transformers. Pass "
            "past_key_values=attached.new_cache()."
        )
    if isinstance(attention_mask, SpecMask):
        return _from_spec(query, kv, attention_mask, settings, kwargs)
    offset = kv_len - q_len
    pairs = same_sequence(query, kv_len, kwargs) if is_traced() else None
    if attention_mask is None:
        cu_seqlens = None if is_traced() else packed_seqlens(query, kv_len, kwargs)
        return AttentionArgs(
            kv=kv, q_offset=offset, mask=own, cu_seqlens=cu_seqlens, attn_mask=pairs
        )
    attn_mask = boolean_mask(attention_mask, query, kv_len)
    if attn_mask.ndim == 2:
        return AttentionArgs(
            kv=kv, q_offset=offset, mask=own, key_padding=attn_mask, attn_mask=pairs
        )
    if offset and (settings.window is not None or settings.sparse is not None):
        raise Unsupported(
            "a 4-D attention mask over a cache of transformers does not say where the queries are, "
            "which n_swa and sparse need. Pass past_key_values=attached.new_cache()."
        )
    attn_mask = attn_mask if pairs is None else attn_mask & pairs
    return AttentionArgs(kv=kv, q_offset=offset, mask=Mask(causal=False), attn_mask=attn_mask)


def _from_spec(
    query: Tensor,
    kv: DenseKV,
    attention_mask: SpecMask,
    settings: AttentionSettings,
    kwargs: dict[str, Any],
) -> AttentionArgs:
    """Tensors with a stock mask; positions count from the first key of the tensor."""
    spec, q_len, kv_len = attention_mask.spec, query.shape[2], kv.k.shape[2]
    _check_length(attention_mask.shape[3], kv_len)
    if spec.kv_offset > 0 and settings.sinks:
        raise Unsupported(
            "n_sinks needs the first keys of the context, but a sliding cache of transformers has "
            "dropped them. Pass past_key_values=attached.new_cache()."
        )
    offset = spec.q_offset - spec.kv_offset
    padding = _moved(spec.padding, query)
    cu_seqlens = None
    if offset == 0 and q_len == kv_len and padding is None:
        cu_seqlens = packed_seqlens(query, kv_len, kwargs)
    if spec.mask.causal and offset + q_len < kv_len:  # the empty slots of a static cache
        kv = DenseKV(kv.k.narrow(2, 0, offset + q_len), kv.v.narrow(2, 0, offset + q_len))
        padding = None if padding is None else padding[:, : offset + q_len]
    return AttentionArgs(
        kv=kv, q_offset=offset, mask=spec.mask, key_padding=padding, cu_seqlens=cu_seqlens
    )


def _check_length(masked: int, num_keys: int) -> None:
    if masked != num_keys:
        raise Unsupported(
            f"the mask was made for {masked} keys, but this layer holds {num_keys}: transformers "
            "makes one mask per layer type, so all layers of a type must hold equally many tokens. "
            "Use a SaccadeCache for budgets that differ between layers."
        )


def _moved(padding: Tensor | None, query: Tensor) -> Tensor | None:
    return None if padding is None else padding.to(query.device)


def _narrowed(args: AttentionArgs, settings: AttentionSettings) -> AttentionArgs:
    """The arguments with the window of the settings in place of the model's own."""
    if settings.window is None:
        return args
    if settings.sinks:
        _check_sinks(args, settings.sinks)
    narrow = Mask(window=settings.window, sinks=settings.sinks)
    if args.attn_mask is not None:  # it may show later keys, which a window does not hide
        return replace(args, attn_mask=args.attn_mask & _near(narrow, args))
    if not args.mask.causal:
        raise Unsupported(
            "n_swa narrows causal attention, but this layer attends to later keys too. "
            "Leave n_swa out for this model."
        )
    return replace(args, mask=narrow)


def _check_sinks(args: AttentionArgs, sinks: int) -> None:
    """Raise where a row's last token does not see its first slots: they are no sinks then."""
    seen = args.key_padding
    if args.attn_mask is not None:
        seen = args.attn_mask[..., -1, :]
    if seen is not None:
        check_values(
            seen[..., :sinks].all(),
            "n_sinks keeps the first slots of every row, but the attention mask hides them "
            "(padding on the left, or packed sequences). Run rows one by one, or set n_sinks=0.",
        )


def _near(narrow: Mask, args: AttentionArgs) -> Tensor:
    """Pairs that a window and its sinks leave visible, later keys included: bool `[Lq, Lk]`."""
    assert args.attn_mask is not None and narrow.window is not None
    q_len, kv_len = args.attn_mask.shape[2:]
    device = args.attn_mask.device
    q_pos = torch.arange(q_len, device=device)[:, None] + args.q_offset
    k_pos = torch.arange(kv_len, device=device)
    return (q_pos - k_pos < narrow.window) | (k_pos < narrow.sinks)
