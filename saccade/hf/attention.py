"""The attention function that transformers calls for `attn_implementation="saccade"`.

It converts what transformers passes (tensors or our handle; a SpecMask, another mask or none) to
the arguments of `saccade.ops.attend`, and returns `[B, Lq, Hq, Dv]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.cache import Cursor
from saccade.core import DenseKV, KVView, Mask, Unsupported
from saccade.core.host_memo import HostMemo
from saccade.hf.deferred_rope import materialize
from saccade.hf.handle import KVHandle, check_window, paired
from saccade.hf.mask import SpecMask
from saccade.hf.settings import AttentionSettings, settings_of
from saccade.ops import AttentionCall, attend, make_call

_UNSUPPORTED = {
    "position_bias": "adds a learned position bias to the scores (T5 and similar)",
    "indices": "selects single keys by an indexer (DeepSeek sparse attention)",
    "block_indices": "selects blocks of keys by an indexer (MiniMax sparse attention)",
    "block_table": "runs in transformers' continuous batching",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionArgs:
    """What is attended to: the view of the keys, the position of the queries, and the mask.

    Positions count from the first key of the view, so `q_offset` and `mask` refer to the view.
    """

    kv: KVView
    q_offset: int | Tensor
    mask: Mask
    key_padding: Tensor | None = None
    kv_lens: Tensor | None = None
    attn_mask: Tensor | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None


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
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it: ([B, Lq, Hq, Dv] contiguous, None).

    Args:
        query: `[B, Hq, Lq, D]`, RoPE applied.
        key, value: `[B, Hkv, Lk, D]` and `[.., Dv]`, or the handles of a SaccadeCache.
        attention_mask: a SpecMask, a 4-D mask (bool, or 0 / -inf), a 2-D padding mask, or None.
        s_aux: `[Hq]`, learned logits in the denominator (gpt-oss).

    Raises:
        Unsupported: dropout, or attention that is no softmax over visible keys.
    """
    _check_supported(module, dropout, kwargs)
    query, own = materialize(query), _own_mask(module, is_causal, sliding_window)
    key, value = paired(key, value)
    settings, observe = settings_of(module), None
    if isinstance(key, KVHandle):
        settings, observe = key.settings or settings, key.observe
        args = _from_handle(query, key, attention_mask, own)
    else:
        assert isinstance(value, Tensor)
        args = _from_tensors(query, DenseKV(key, value), attention_mask, own, settings, kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    options = {"scale": scale, "softcap": softcap, "sink_logits": s_aux, "wants_lse": bool(observe)}
    call = _call(query, _narrowed(args, settings), settings, options)
    result = attend(call, backend=settings.backend)
    if observe is not None:
        observe(call, result.lse.detach())
    return result.out.transpose(1, 2).contiguous(), None


def _own_mask(module: nn.Module, is_causal: bool | None, window: int | None) -> Mask:
    """The mask that the model itself implies; used where transformers passes none."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return Mask(causal=causal, window=window if causal else None)


def _call(
    query: Tensor,
    args: AttentionArgs,
    settings: AttentionSettings,
    options: dict[str, Any],
) -> AttentionCall:
    """The call of the operator; `options` are those of the scores and `wants_lse`."""
    blocks = None
    if settings.sparse is not None:
        if not isinstance(args.q_offset, int):
            raise Unsupported(
                "sparse patterns need the position of the queries on the host. Use Context.append."
            )
        blocks = settings.sparse.select(query, args.kv, args.q_offset)
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


def _check_supported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise Unsupported(
            f"saccade attention has no dropout on attention weights, got dropout={dropout}. "
            "Set config.attention_dropout to 0, or train with another attn_implementation."
        )
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise Unsupported(
                f"saccade attention cannot run {type(module).__name__}: it {meaning}. "
                'Use attn_implementation="eager" for this model.'
            )


def _from_handle(
    query: Tensor, handle: KVHandle, attention_mask: Tensor | None, own: Mask
) -> AttentionArgs:
    """A call on one of our caches: the view has the positions of its keys."""
    if handle.cursor is not None:
        return _from_step(handle, handle.cursor, attention_mask, own)
    end = handle.shape[2]
    args = AttentionArgs(kv=handle.view, q_offset=end - query.shape[2], mask=own)
    if isinstance(attention_mask, SpecMask):
        spec = attention_mask.spec
        _check_length(attention_mask.shape[3] + spec.kv_offset, handle.seen)
        args = replace(args, mask=spec.mask, key_padding=_moved(spec.padding, query))
    elif attention_mask is not None:
        attn_mask = _boolean(attention_mask, query, handle.seen)
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
    return AttentionArgs(kv=handle.view, q_offset=cursor.start, mask=mask, kv_lens=cursor.stop)


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
            "the options in force (cache type or compression policy) need saccade's caches, but "
            "the keys came from a cache of transformers. Pass past_key_values=attached.new_cache()."
        )
    if isinstance(attention_mask, SpecMask):
        return _from_spec(query, kv, attention_mask, settings, kwargs)
    offset = kv_len - q_len
    if attention_mask is None:
        cu_seqlens = _packed_seqlens(query, kv_len, kwargs)
        return AttentionArgs(kv=kv, q_offset=offset, mask=own, cu_seqlens=cu_seqlens)
    attn_mask = _boolean(attention_mask, query, kv_len)
    if attn_mask.ndim == 2:
        return AttentionArgs(kv=kv, q_offset=offset, mask=own, key_padding=attn_mask)
    if offset and (settings.window is not None or settings.sparse is not None):
        raise Unsupported(
            "a 4-D attention mask over a cache of transformers does not say where the queries are, "
            "which n_swa and sparse need. Pass past_key_values=attached.new_cache()."
        )
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
        cu_seqlens = _packed_seqlens(query, kv_len, kwargs)
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


def _packed_seqlens(
    query: Tensor, kv_len: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """cu_seqlens of sequences packed into one row, or None for one sequence.

    Some models (gpt-oss among them) do not pass position_ids to transformers' mask code, so packed
    sequences would attend to each other.  A position that does not increase begins a new sequence.
    """
    batch, _, q_len, _ = query.shape
    if batch != 1 or q_len != kv_len or q_len < 2:
        return None
    queries, keys = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if isinstance(queries, Tensor):
        return queries, keys if isinstance(keys, Tensor) else queries
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or kwargs.get("use_cache"):
        return None
    if positions.shape != (1, q_len):
        return None
    cu_seqlens = _restarts(positions)
    return None if cu_seqlens is None else (cu_seqlens, cu_seqlens)


def _read_restarts(positions: Tensor) -> Tensor | None:
    """cu_seqlens of positions `[1, Lq]` that start anew, None if none do."""
    starts = (positions[0].diff() <= 0).nonzero().flatten() + 1
    if starts.numel() == 0:
        return None
    edge = starts.new_tensor([0]), starts.new_tensor([positions.shape[1]])
    return torch.cat((edge[0], starts, edge[1]))


_restarts = HostMemo(_read_restarts)  # once for all layers


def _boolean(attention_mask: Tensor, query: Tensor, kv_len: int) -> Tensor:
    """A mask as bool, True = attend: `[B | 1, H | 1, Lq, Lk]`, or padding `[B, Lk]`."""
    if attention_mask.ndim not in (2, 4) or attention_mask.shape[-1] < kv_len:
        raise Unsupported(
            f"attention_mask must be [batch, keys] or [batch, heads, queries, keys] for {kv_len} "
            f"keys, got {list(attention_mask.shape)}. Pass a 2-D mask or a full 4-D one."
        )
    mask = attention_mask[..., :kv_len].to(query.device)
    if mask.dtype == torch.bool:
        return mask
    if mask.ndim == 2 or not mask.is_floating_point():
        return mask != 0
    visible = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((visible | hidden).all()):
        raise Unsupported(
            "a floating-point attention_mask may hold only 0 and -inf (or the dtype's minimum): "
            'saccade attention adds no bias. Use attn_implementation="eager" for biased scores.'
        )
    return visible


def _narrowed(args: AttentionArgs, settings: AttentionSettings) -> AttentionArgs:
    """The arguments with the window of the settings in place of the model's own."""
    if settings.window is None:
        return args
    if settings.sinks and args.key_padding is not None:
        first = args.key_padding[:, : settings.sinks]
        if not bool(first.all()):
            raise Unsupported(
                "n_sinks keeps the first slots of every row, but the batch is padded on the left. "
                "Pad on the right, run the rows one by one, or set n_sinks=0."
            )
    return replace(args, mask=Mask(window=settings.window, sinks=settings.sinks))
