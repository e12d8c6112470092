"""PeerCall: an attention call as peers take it, and what none of them takes.

Peers store tokens before heads, align the last query with the last key, and say by a window and
one flag which keys a query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, KeyRange, PagedKV
from saccade.ops.attention.call import AttentionCall, dtype_refusal
from saccade.ops.attention.combine import with_sink_logits
from saccade.ops.attention.first_order import first_order

HALVES = (torch.bfloat16, torch.float16)
ALL_KEYS = -1
DESCRIBED = "peers"  # its place among what is known of a signature


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which keys a query sees, the last query sitting at the last key.

    Attributes:
        causal: no later ones.
        left: so many before its own position, ALL_KEYS for all.
    """

    causal: bool
    left: int = ALL_KEYS

    @property
    def window_size(self) -> tuple[int, int]:
        """(left, right) as flash-attn's functions take it; -1 is no limit."""
        return self.left, ALL_KEYS if self.left == ALL_KEYS else 0


class PeerCall(NamedTuple):
    """A dense call: `[B, L, H, D]`, or packed sequences `[L, H, D]` with their cumulative lengths.

    Attributes:
        q, k, v: unit last strides, all others distinct multiples of 16 bytes.
        cu_q, cu_k: int32 `[sequences + 1]`, None where nothing is packed.
    """

    call: AttentionCall
    pattern: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor | None
    cu_k: Tensor | None

    def options(self) -> dict[str, Any]:
        """What all functions of flash-attn name alike."""
        return {
            "softmax_scale": self.call.scale,
            "causal": self.pattern.causal,
            "window_size": self.pattern.window_size,
            "softcap": self.call.softcap or 0.0,
        }

    def lengths(self) -> dict[str, Any]:
        """What flash-attn's varlen functions take besides; lengths of sequences are not read.

        The longest sequence is named by the length of all: it only bounds the grid of a kernel.
        """
        return {
            "cu_seqlens_q": self.cu_q,
            "cu_seqlens_k": self.cu_k,
            "max_seqlen_q": self.q.shape[0],
            "max_seqlen_k": self.k.shape[0],
        }


def shared_refusal(
    call: AttentionCall, *, lens: bool = False, lse_gradient: bool = False
) -> str | None:
    """Why no peer runs the call, or None.

    Args:
        lens: the peer takes pages and rows with lengths of their own.
        lse_gradient: the peer's lse has a gradient.
    """
    kv, paged = call.kv, isinstance(call.kv, PagedKV)
    if not paged and not (isinstance(kv, DenseKV) and kv.is_plain):
        return f"it takes plain dense keys, got {type(kv).__name__}"
    if (paged or call.kv_lens is not None) and not lens:
        return (
            "it multiplies what lies behind a row's keys by 0, which may be NaN, "
            "so it takes no pages and no kv_lens"
        )
    if call.q.dtype not in HALVES:
        return f"{call.q.dtype} is not one of bfloat16, float16"
    if any(x is not None for x in (call.key_padding, call.blocks, call.attn_mask)):
        return "it takes no key_padding, blocks or attn_mask"
    if not call.scale > 0:
        return f"scale must be positive, got {call.scale}"
    if 0 in (call.q.shape[0], call.q.shape[2], kv.shape[2]):
        return "it takes no empty queries or keys"
    pattern = pattern_of(call)
    reason = pattern if isinstance(pattern, str) else dtype_refusal(call)
    return reason or (_gradient_refusal(call, lse_gradient) if call.needs_grad else None)


def _gradient_refusal(call: AttentionCall, lse_gradient: bool) -> str | None:
    if call.sink_logits is not None:
        return "sink_logits get no gradient"
    if call.wants_lse and not lse_gradient:
        return "its lse has no gradient"
    if call.kv_lens is not None or isinstance(call.kv, PagedKV):
        return "it has no gradients over pages and kv_lens"
    return None


def dims_refusal(call: AttentionCall, largest: int = 256) -> str | None:
    """Why head dimensions do not suit kernels that read 16 bytes at a time, or None."""
    for dim in (call.q.shape[3], call.kv.shape[4]):
        if dim % 8 or dim > largest:
            return f"head_dim {dim} is not a multiple of 8 up to {largest}"
    return None


def pattern_of(call: AttentionCall) -> Pattern | str:
    """The Pattern of a call, or why it has none."""
    mask, q_len, end = call.mask, call.q.shape[2], call.kv.shape[2]
    left = ALL_KEYS if mask.window is None or mask.window >= end else mask.window - 1
    if mask.sinks and left != ALL_KEYS:
        return "it cannot keep the first keys visible outside a window"
    if not mask.causal:
        return Pattern(False)
    if call.cu_seqlens is not None:
        return Pattern(True, left)
    if isinstance(call.q_offset, Tensor):
        return "it takes no positions of queries in a tensor"
    first, last = call.q_offset, call.q_offset + q_len - 1
    if mask.is_full(first, last, KeyRange(0, end)):
        return Pattern(False)
    if last + 1 != end or call.kv_lens is not None or isinstance(call.kv, PagedKV):
        return "it takes the last query for that of the last key, which it is not here"
    return Pattern(True, left)


def peer_call(call: AttentionCall) -> PeerCall:
    """The tensors of a call over dense keys that `shared_refusal` accepts."""
    kv, (pattern, in_place) = call.kv, _described(call)
    assert isinstance(kv, DenseKV)
    q, k, v = call.q, kv.k, kv.v
    if call.needs_grad:
        q, k, v = map(first_order, (q, k, v))
    if in_place:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    else:
        q, k, v = map(tokens, (q, k, v))
    if call.cu_seqlens is None:
        return PeerCall(call, pattern, q, k, v, None, None)
    cu_q, cu_k = (x.to(torch.int32).contiguous() for x in call.cu_seqlens)
    return PeerCall(call, pattern, q[0], k[0], v[0], cu_q, cu_k)


def _described(call: AttentionCall) -> tuple[Pattern, bool]:
    """The pattern, and whether no tensor has to be copied: worked out once per signature."""
    known = call.known
    found = None if known is None else known.prepared.get(DESCRIBED)
    if found is None:
        pattern = pattern_of(call)
        assert isinstance(pattern, Pattern) and isinstance(call.kv, DenseKV)
        found = pattern, all(map(_is_loadable, (call.q, call.kv.k, call.kv.v)))
        if known is not None:
            known.prepared[DESCRIBED] = found
    return found


def tokens(x: Tensor) -> Tensor:
    """`[B, H, L, D]` as `[B, L, H, D]`, copied where TMA cannot load it."""
    if not _is_loadable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.transpose(1, 2)


def _is_loadable(x: Tensor) -> bool:
    """Whether rows lie at distinct multiples of 16 bytes; strides of a single one count too."""
    size = x.element_size()
    *steps, unit = x.stride()
    starts = x.data_ptr() if not x.is_meta else 0
    return unit == 1 and starts % 16 == 0 and all(s > 0 and s * size % 16 == 0 for s in steps)


def result(call: AttentionCall, out: Tensor, lse: Tensor | None) -> AttentionOutput:
    """What a peer returned, in our layout and with learned sinks.

    Args:
        out: `[B, Lq, H, Dv]`, or packed `[Lq, H, Dv]`.
        lse: float32 `[B, H, Lq]`, or packed `[H, Lq]`; None where nobody asked for it.
    """
    out = out[None] if out.ndim == 3 else out
    if lse is None:
        lse = out.new_empty(call.q.shape[:3], dtype=torch.float32)
    found = AttentionOutput(out.transpose(1, 2), lse[None] if lse.ndim == 2 else lse)
    sinks = call.sink_logits
    return found if sinks is None else with_sink_logits(found, sinks)


def needs_lse(call: AttentionCall) -> bool:
    """Whether a peer has to return its lse."""
    return call.wants_lse or call.sink_logits is not None


def forward_of(
    run: Callable[[AttentionCall], AttentionOutput],
) -> Callable[[AttentionCall], AttentionOutput]:
    """`forward` of a backend whose `run` may leave the lse out: both are filled and contiguous."""

    def forward(call: AttentionCall) -> AttentionOutput:
        out, lse = run(call if call.wants_lse else call.with_(wants_lse=True))
        return AttentionOutput(out.contiguous(), lse.contiguous())

    return forward
