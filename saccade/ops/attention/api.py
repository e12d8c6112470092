"""The public functions of attention: check, describe the call, choose a backend, run it."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from operator import is_
from typing import Any, cast

from torch import Tensor

from saccade.core import (
    AttentionOutput,
    BlockSelection,
    DenseKV,
    KVView,
    Mask,
    PagedKV,
    PerHeadFP8,
    PerHeadFP8KV,
    Span,
    Unsupported,
)
from saccade.core.check import check_qkv, describe, integer, number, truth
from saccade.core.formats import FP8
from saccade.core.fp8 import qdata_of, scale_of
from saccade.ops.attention import dispatch, known, operator
from saccade.ops.attention.call import AttentionCall, known_again
from saccade.ops.attention.checks import check_kinds, check_masks, check_traceable
from saccade.ops.attention.first_key import from_first_key
from saccade.ops.kv_write.hadamard import hadamard_transform


def attention(
    q: Tensor | PerHeadFP8,
    k: Tensor | PerHeadFP8,
    v: Tensor | PerHeadFP8,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_padding: Tensor | None = None,
    kv_lens: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    blocks: BlockSelection | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | AttentionOutput:
    """softmax(q k^T * scale) v over the visible keys of each query; O(length) memory by default.

    q, k and v may have different dtypes, as queries over a cache in another one do: each number is
    read as it is, sums are float32 (float64 for float64 queries), and the output has the dtype of
    q.  A backend whose kernels need equal dtypes says so where it is named, and `auto` takes
    another one.

    Args:
        q: `[batch, heads, q_len, head_dim]`, float32 / float64 / bfloat16 / float16; or, like k
            and v, a `PerHeadFP8` (see `saccade.quantize_fp8_per_head`), or a bare
            float8_e4m3fn tensor, whose scale is 1.
        k: `[batch, kv_heads, kv_len, head_dim]`; heads is a multiple of kv_heads (GQA, MQA:
            query head h reads key head h // (heads // kv_heads); nothing is repeated in memory).
        v: `[batch, kv_heads, kv_len, value_dim]`.
        causal: no query attends to a later key.  With q_len < kv_len queries sit at the end
            (bottom-right alignment).
        window: a query attends to the last `window` keys, itself counted.
        sinks: the first `sinks` keys stay visible outside the window (StreamingLLM).
        scale: default head_dim ** -0.5.
        softcap: scores become softcap * tanh(scores / softcap), after scale, before mask (Gemma 2).
        sink_logits: `[heads]` learned logits that join the denominator (gpt-oss).
        alibi_slopes: `[heads]` or `[batch, heads]`; adds -slope * |q_pos - k_pos|.
        key_padding: bool `[batch, kv_len]`, True for real keys (any pattern of holes).
        kv_lens: int64 `[batch]`, keys of each row from the start; queries then sit at the end of
            their own row.
        cu_seqlens: int32 or int64 `[sequences + 1]` cumulative lengths of sequences packed into
            one row (batch 1), or one such tensor for queries and one for keys.
        blocks: BlockSelection, which blocks of keys a block of queries may read.
        return_lse: return AttentionOutput(out, lse) instead of out alone.
        backend: "auto", or a name that never falls back (see `saccade.explain`).

    Returns:
        `[batch, heads, q_len, value_dim]` in the dtype of q (bfloat16 for fp8); rows
        that attend to nothing are 0.

    Raises:
        TypeError, ValueError: inputs that do not fit together.
        Unsupported: the named backend cannot run this call.
    """
    options = (causal, window, sinks, scale, softcap, None, return_lse)
    others = _others(sink_logits, alibi_slopes, key_padding, kv_lens, blocks)
    signature = None if cu_seqlens is not None else known.signature_of(q, (k, v), options, others)
    before = known.find(signature)
    if before is not None:  # they are plain tensors: others have no signature
        q = cast(Tensor, q)
        repeat = dispatch.repeated(before, q, backend, others)
        if repeat is not None:
            out, lse = repeat((q, cast(Tensor, k), cast(Tensor, v)))
            return AttentionOutput(out, lse) if return_lse else out
        call = _again(before, q, _dense_again(k, v, before.spans), others)
    else:
        truth("return_lse", return_lse)
        check_traceable(q, k, v)
        check_qkv(qdata_of(q), qdata_of(k), qdata_of(v))
        call = _described(
            q,
            _view(k, v),
            mask=Mask(causal=causal, window=window, sinks=sinks),
            scale=scale,
            softcap=softcap,
            sink_logits=sink_logits,
            alibi_slopes=alibi_slopes,
            key_padding=key_padding,
            kv_lens=kv_lens,
            cu_seqlens=cu_seqlens,
            blocks=blocks,
            wants_lse=return_lse,
        )
        _remember(signature, call)
    result = attend(call, backend=backend)
    return result if return_lse else result.out


def _view(k: Tensor | PerHeadFP8, v: Tensor | PerHeadFP8) -> DenseKV | PerHeadFP8KV:
    """Plain keys and values as a view."""
    qdata = DenseKV(qdata_of(k), qdata_of(v))
    return PerHeadFP8KV(qdata, scale_of(k), scale_of(v)) if qdata.dtype == FP8 else qdata


def attend(call: AttentionCall, *, backend: str = "auto") -> AttentionOutput:
    """Run a call made by `make_call`, over any view of a cache.

    Args:
        backend: "auto", or a name that never falls back.

    Raises:
        ValueError: no such backend.
        Unsupported: the named backend cannot run this call.
    """
    if not isinstance(call, AttentionCall):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"call must be an AttentionCall of saccade.make_call, got {describe(call)}."
        )
    call = from_first_key(call)
    chosen = dispatch.remembered(call, backend)
    if chosen is None:
        if call.kv.hadamard and not dispatch.transforms(call, backend):
            result = attend(call.transformed(), backend=backend)
            return AttentionOutput(hadamard_transform(result.out), result.lse)
        chosen = dispatch.choose(call, backend)
        if operator.needed(call, chosen):
            return operator.run(call, backend)
        dispatch.remember(call, backend, chosen)
    return chosen.run(call)


def explain(
    q: Tensor | PerHeadFP8, k: Tensor | PerHeadFP8, v: Tensor | PerHeadFP8, **options: object
) -> list[tuple[str, str]]:
    """One (backend, verdict) pair per backend for the same arguments as `attention`.

    The verdict is "chosen" (on a GPU with the measurement that decided, after a colon),
    "supported, slower here", "supported, but " or "cannot: " and the reason.
    """
    check_traceable(q, k, v)
    check_qkv(qdata_of(q), qdata_of(k), qdata_of(v))
    names = ("causal", "window", "sinks")
    mask = Mask(**{name: options.pop(name) for name in names if name in options})  # type: ignore[arg-type]
    options["wants_lse"] = options.pop("return_lse", False)
    return dispatch.explain(make_call(q, _view(k, v), mask=mask, **options))  # type: ignore[arg-type]


def make_call(
    q: Tensor | PerHeadFP8,
    kv: KVView,
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_padding: Tensor | None = None,
    kv_lens: Tensor | None = None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None = None,
    blocks: BlockSelection | None = None,
    attn_mask: Tensor | None = None,
    q_offset: int | Tensor | None = None,
    wants_lse: bool = True,
) -> AttentionCall:
    """The checked description of one attention problem over a view, for `attend`.

    Args:
        q: `[batch, heads, q_len, head_dim]`.
        kv: dense, ring, paged, ragged, quantized or fp8 view; its keys have absolute positions.
        mask: which pairs are visible by position.
        attn_mask: bool `[batch | 1, heads | 1, q_len, kv_len]`, True = visible; intersected with
            everything else.
        q_offset: position of the first query, an int or int64 `[batch]`; default: the queries
            end where the view (or each row of it) ends.
        wants_lse: if False, the lse is undefined; some kernels then save work.

    The other arguments are those of `attention`.  Queries over a view that holds Hadamard-
    transformed keys are given as they are: `attend` transforms them.

    Raises:
        TypeError, ValueError, Unsupported: arguments that do not fit together.
    """
    offset = q_offset if isinstance(q_offset, Tensor) else None
    others = _others(sink_logits, alibi_slopes, key_padding, kv_lens, blocks, attn_mask, offset)
    signature = None
    if cu_seqlens is None and type(mask) is Mask:
        start = None if offset is not None else q_offset
        options = (mask.causal, mask.window, mask.sinks, scale, softcap, start, wants_lse)
        signature = known.signature_of(q, kv, options, others)
    before = known.find(signature)
    if before is not None:
        assert isinstance(q, Tensor)
        return _again(before, q, kv, others)
    call = _described(
        q,
        kv,
        mask=mask,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        key_padding=key_padding,
        kv_lens=kv_lens,
        cu_seqlens=cu_seqlens,
        blocks=blocks,
        attn_mask=attn_mask,
        q_offset=q_offset,
        wants_lse=wants_lse,
    )
    _remember(signature, call)
    return call


def _described(
    q: Tensor | PerHeadFP8,
    kv: KVView,
    *,
    mask: Mask,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    key_padding: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens: Tensor | tuple[Tensor, Tensor] | None,
    blocks: BlockSelection | None,
    wants_lse: bool,
    attn_mask: Tensor | None = None,
    q_offset: int | Tensor | None = None,
) -> AttentionCall:
    """A call that is checked from the start; see `make_call`."""
    q_scale = q.scale if isinstance(q, PerHeadFP8) else None
    q = qdata_of(q)
    check_traceable(q, kv_lens)
    check_kinds(q, kv, mask)
    if kv_lens is not None and q_offset is None:  # the default offset is made of them
        check_masks(q, kv, None, kv_lens, None, None)
    if cu_seqlens is not None and q_offset is not None:
        raise Unsupported(
            "cu_seqlens cannot be combined with q_offset: positions restart at every sequence."
        )
    if q_offset is None:
        q_offset = _default_offset(q, kv, mask, kv_lens, alibi_slopes)
    elif not isinstance(q_offset, Tensor):
        q_offset = integer("q_offset", q_offset)
    return AttentionCall(
        q=q,
        kv=kv,
        mask=mask,
        scale=q.shape[3] ** -0.5 if scale is None else number("scale", scale),
        q_offset=q_offset,
        softcap=None if softcap is None else number("softcap", softcap),
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        key_padding=key_padding,
        kv_lens=kv_lens,
        cu_seqlens=None if cu_seqlens is None else _sequence_bounds(cu_seqlens),
        blocks=blocks,
        attn_mask=attn_mask,
        wants_lse=truth("wants_lse", wants_lse),
        q_scale=q_scale,
    )


def _remember(signature: known.Signature | None, call: AttentionCall) -> None:
    """Keep what was worked out for a call, for the next ones of its signature."""
    if signature is None or call.q.is_meta:
        return
    offset, kv = call.q_offset, call.kv
    found = known.Known(
        call.mask,
        (call.scale, call.softcap),
        None if isinstance(offset, Tensor) else offset,
        kv.spans if isinstance(kv, DenseKV) else (),
        wants_lse=call.wants_lse,
        learns=any(x.requires_grad for x in call.floats),
    )
    known.remember(signature, found)
    object.__setattr__(call, "known", found)


def _others(*given: object) -> tuple[Any, ...]:
    """The arguments that NO_OTHERS names, or itself; those at the end may be left out."""
    if all(map(_IS_NONE, given)):
        return known.NO_OTHERS
    return *given, *known.NO_OTHERS[len(given) :]


_IS_NONE = partial(is_, None)


def _again(before: known.Known, q: Tensor, kv: KVView, others: tuple[Any, ...]) -> AttentionCall:
    """A call of a signature that is known, over a view that was checked."""
    at = before.q_offset
    if at is None:
        *_, kv_lens, _, _, offset = others
        at = offset if offset is not None else _row_ends(kv, kv_lens) - q.shape[2]
    return known_again(before, q, kv, at, others)


def _dense_again(k: object, v: object, spans: tuple[Span, ...]) -> DenseKV:
    """DenseKV(k, v) of tensors whose signature was checked before."""
    kv = object.__new__(DenseKV)
    for put, value in zip(_PUT_DENSE, (k, v, spans, False), strict=True):
        put(kv, value)
    return kv


_PUT_DENSE = tuple(getattr(DenseKV, each.name).__set__ for each in fields(DenseKV))


def _row_ends(kv: KVView, kv_lens: Tensor | None) -> Tensor:
    """Where the keys of each row end, int64 `[batch]`."""
    ends = kv.kv_lens if isinstance(kv, PagedKV) else kv_lens
    assert ends is not None
    return ends.long()


def _default_offset(
    q: Tensor, kv: KVView, mask: Mask, kv_lens: Tensor | None, slopes: Tensor | None
) -> int | Tensor:
    """Queries end where their keys end: each row of the batch, or the view as a whole.

    A last query that attends to all keys of its row may have any position after them, so for one
    token no kernel computes its position.
    """
    alike = kv_lens is None and not isinstance(kv, PagedKV)
    all_keys = mask.window is None and (q.shape[2] == 1 or not mask.causal)
    if alike or (all_keys and slopes is None):
        return kv.shape[2] - q.shape[2]
    return _row_ends(kv, kv_lens) - q.shape[2]


def _sequence_bounds(cu_seqlens: object) -> tuple[Tensor, Tensor]:
    """Cumulative lengths of queries and of keys, the same where one tensor is given."""
    if isinstance(cu_seqlens, Tensor):
        return cu_seqlens, cu_seqlens
    if not isinstance(cu_seqlens, tuple | list) or len(cu_seqlens) != 2:  # pyright: ignore[reportUnknownArgumentType]
        raise TypeError(
            "cu_seqlens must be one tensor, or one for queries and one for keys, "
            f"got {describe(cu_seqlens)}."
        )
    first, second = cu_seqlens  # pyright: ignore[reportUnknownVariableType]
    return first, second
