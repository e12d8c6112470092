"""The attention function that transformers calls for `attn_implementation="saccade"`.

It reads what transformers passes (tensors or our handle, a SpecMask, a foreign mask or none),
says it in the words of `saccade.ops.attend`, and returns `[B, Lq, Hq, Dv]`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from saccade.cache import Cursor
from saccade.core import AttentionOutput, DenseKV, KVView, Mask, Unsupported
from saccade.core.host_memo import HostMemo
from saccade.hf.deferred_rope import settled
from saccade.hf.handle import KVHandle
from saccade.hf.mask import SpecMask
from saccade.hf.settings import AttentionSettings, settings_of
from saccade.ops import attend

_FOREIGN = {
    "position_bias": "adds a learned position bias to the scores (T5 and its kin)",
    "indices": "selects single keys by an indexer (DeepSeek sparse attention)",
    "block_indices": "selects blocks of keys by an indexer (MiniMax sparse attention)",
    "block_table": "runs in transformers' continuous batching",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """One attention problem: the view, where its queries lie, and who sees whom.

    Positions count from the first key of the view, so `q_offset` and `mask` speak of the view.
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
    """Attention of one layer, as transformers asks for it: ([B, Lq, Hq, Dv] contiguous, None).

    Args:
        query: `[B, Hq, Lq, D]`, rotated.
        key, value: `[B, Hkv, Lk, D]` and `[.., Dv]`, or the handles of a SaccadeCache.
        attention_mask: a SpecMask, a 4-D mask (bool, or 0 / -inf), a 2-D padding mask, or None.
        s_aux: `[Hq]`, learned logits in the denominator (gpt-oss).

    Raises:
        Unsupported: dropout, or attention that is no softmax over visible keys.
    """
    _check_supported(module, dropout, kwargs)
    query = settled(query)
    settings, own = settings_of(module), _own_mask(module, is_causal, sliding_window)
    if isinstance(key, KVHandle):
        problem, observe = _from_handle(query, key, attention_mask, own), key.observe
    else:
        assert isinstance(value, Tensor)
        kv, observe = DenseKV(key, value), None
        problem = _from_tensors(query, kv, attention_mask, own, settings, kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    options = {"scale": scale, "softcap": softcap, "sink_logits": s_aux}
    result = _attended(query, _narrowed(problem, settings), settings, observe is not None, options)
    if observe is not None:
        observe(query.detach(), result.lse.detach(), scale)
    return result.out.transpose(1, 2).contiguous(), None


def _own_mask(module: nn.Module, is_causal: bool | None, window: int | None) -> Mask:
    """What the model says about itself; holds where transformers passes no mask."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return Mask(causal=causal, window=window if causal else None)


def _attended(
    query: Tensor,
    problem: Geometry,
    settings: AttentionSettings,
    wants_lse: bool,
    options: dict[str, Any],
) -> AttentionOutput:
    """The problem in the words of the operator; `options` shape the scores."""
    blocks = None
    if settings.sparse is not None:
        if not isinstance(problem.q_offset, int):
            raise Unsupported("sparse patterns need to know where queries are. Use Context.append.")
        blocks = settings.sparse.select(query, problem.kv, problem.q_offset)
    return attend(
        query,
        problem.kv,
        mask=problem.mask,
        key_padding=problem.key_padding,
        kv_lens=problem.kv_lens,
        cu_seqlens=problem.cu_seqlens,
        attn_mask=problem.attn_mask,
        q_offset=None if problem.cu_seqlens is not None else problem.q_offset,
        blocks=blocks,
        wants_lse=wants_lse,
        backend=settings.backend,
        **options,
    )


def _check_supported(module: nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout > 0:
        raise Unsupported(
            f"saccade attention has no dropout on attention weights, got dropout={dropout}. "
            "Set config.attention_dropout to 0, or train with another attn_implementation."
        )
    for name, meaning in _FOREIGN.items():
        if kwargs.get(name) is not None:
            raise Unsupported(
                f"saccade attention cannot run {type(module).__name__}: it {meaning}. "
                'Use attn_implementation="eager" for this model.'
            )


def _from_handle(
    query: Tensor, handle: KVHandle, attention_mask: Tensor | None, own: Mask
) -> Geometry:
    """A call on one of our caches: the view knows the positions of its keys."""
    if handle.cursor is not None:
        return _from_step(handle, handle.cursor, attention_mask, own)
    end = handle.shape[2]
    problem = Geometry(kv=handle.view, q_offset=end - query.shape[2], mask=own)
    if isinstance(attention_mask, SpecMask):
        spec = attention_mask.spec
        _check_length(attention_mask.shape[3] + spec.kv_offset, handle.seen)
        problem = replace(problem, mask=spec.mask, key_padding=_moved(spec.padding, query))
    elif attention_mask is not None:
        foreign = _boolean(attention_mask, query, handle.seen)
        if foreign.ndim == 2:
            problem = replace(problem, key_padding=foreign)
        else:
            problem = replace(problem, mask=Mask(causal=False), attn_mask=foreign)
    padded = problem.key_padding is not None or problem.attn_mask is not None
    if end != handle.seen and (padded or problem.mask.window is not None):
        raise Unsupported(
            f"a compressed cache ({end} keys kept of {handle.seen} tokens) no longer knows which "
            "slot held which token, so padding, 4-D masks and windows cannot be applied. "
            "Run unpadded rows, or set no kv_policy."
        )
    return problem


def _from_step(
    handle: KVHandle, cursor: Cursor, attention_mask: Tensor | None, own: Mask
) -> Geometry:
    """A call of a decoding step: where queries and keys end, the device knows."""
    mask = own
    if isinstance(attention_mask, SpecMask) and attention_mask.spec.padding is None:
        mask = attention_mask.spec.mask
    elif attention_mask is not None:
        raise Unsupported("a decoding step takes no padding and no 4-D mask: run unpadded rows.")
    return Geometry(kv=handle.view, q_offset=cursor.start, mask=mask, kv_lens=cursor.stop)


def _from_tensors(
    query: Tensor,
    kv: DenseKV,
    attention_mask: Tensor | None,
    own: Mask,
    settings: AttentionSettings,
    kwargs: dict[str, Any],
) -> Geometry:
    """A call on plain tensors: no cache, or one of transformers'."""
    q_len, kv_len = query.shape[2], kv.k.shape[2]
    if settings.needs_own_cache and kv_len != q_len:
        raise Unsupported(
            "the options in force (cache type or compression policy) live in saccade's caches, but "
            "the keys came from a cache of transformers. Pass past_key_values=attached.new_cache()."
        )
    if isinstance(attention_mask, SpecMask):
        return _from_spec(query, kv, attention_mask, settings, kwargs)
    offset = kv_len - q_len
    if attention_mask is None:
        bounds = _document_bounds(query, kv_len, kwargs)
        return Geometry(kv=kv, q_offset=offset, mask=own, cu_seqlens=bounds)
    foreign = _boolean(attention_mask, query, kv_len)
    if foreign.ndim == 2:
        return Geometry(kv=kv, q_offset=offset, mask=own, key_padding=foreign)
    if offset and (settings.window is not None or settings.sparse is not None):
        raise Unsupported(
            "a 4-D attention mask over a cache of transformers does not say where the queries are, "
            "which n_swa and sparse need. Pass past_key_values=attached.new_cache()."
        )
    return Geometry(kv=kv, q_offset=offset, mask=Mask(causal=False), attn_mask=foreign)


def _from_spec(
    query: Tensor,
    kv: DenseKV,
    attention_mask: SpecMask,
    settings: AttentionSettings,
    kwargs: dict[str, Any],
) -> Geometry:
    """Tensors with a stock mask; positions are counted from the first key that is there."""
    spec, q_len, kv_len = attention_mask.spec, query.shape[2], kv.k.shape[2]
    _check_length(attention_mask.shape[3], kv_len)
    if spec.kv_offset > 0 and settings.sinks:
        raise Unsupported(
            "n_sinks needs the first keys of the context, but a sliding cache of transformers has "
            "dropped them. Pass past_key_values=attached.new_cache()."
        )
    offset = spec.q_offset - spec.kv_offset
    padding = _moved(spec.padding, query)
    bounds = None
    if offset == 0 and q_len == kv_len and padding is None:
        bounds = _document_bounds(query, kv_len, kwargs)
    if spec.mask.causal and offset + q_len < kv_len:  # the empty slots of a static cache
        kv = DenseKV(kv.k.narrow(2, 0, offset + q_len), kv.v.narrow(2, 0, offset + q_len))
        padding = None if padding is None else padding[:, : offset + q_len]
    return Geometry(kv=kv, q_offset=offset, mask=spec.mask, key_padding=padding, cu_seqlens=bounds)


def _check_length(masked: int, held: int) -> None:
    if masked != held:
        raise Unsupported(
            f"the mask was made for {masked} keys, but this layer holds {held}: transformers makes "
            "one mask per layer type, so all layers of a type must hold equally many tokens. "
            "Use a SaccadeCache for budgets that differ between layers."
        )


def _moved(padding: Tensor | None, query: Tensor) -> Tensor | None:
    return None if padding is None else padding.to(query.device)


def _document_bounds(
    query: Tensor, kv_len: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """Cumulative lengths of documents packed into one row, or None for one document.

    Some models (gpt-oss among them) do not tell transformers' mask code about position_ids, so
    packed documents would see each other.  Positions that go back mean a new document.
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
    bounds = _restarts(positions)
    return None if bounds is None else (bounds, bounds)


def _read_restarts(positions: Tensor) -> Tensor | None:
    """Cumulative lengths of what lies between positions `[1, Lq]` that go back, None if none do."""
    starts = (positions[0].diff() <= 0).nonzero().flatten() + 1
    if starts.numel() == 0:
        return None
    edge = starts.new_tensor([0]), starts.new_tensor([positions.shape[1]])
    return torch.cat((edge[0], starts, edge[1]))


_restarts = HostMemo(_read_restarts)  # once for all layers


def _boolean(attention_mask: Tensor, query: Tensor, kv_len: int) -> Tensor:
    """A foreign mask as bool, True = may be seen: `[B | 1, H | 1, Lq, Lk]` or padding `[B, Lk]`."""
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


def _narrowed(problem: Geometry, settings: AttentionSettings) -> Geometry:
    """The problem with the window of the settings in place of the model's own."""
    if settings.window is None:
        return problem
    if settings.sinks and problem.key_padding is not None:
        first = problem.key_padding[:, : settings.sinks]
        if not bool(first.all()):
            raise Unsupported(
                "n_sinks keeps the first slots of every row, but the batch is padded on the left. "
                "Pad on the right, run the rows one by one, or set n_sinks=0."
            )
    return replace(problem, mask=Mask(window=settings.window, sinks=settings.sinks))
