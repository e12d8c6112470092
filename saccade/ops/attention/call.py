"""AttentionCall: everything one call is about, checked once, the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from saccade.core import (
    BlockSelection,
    DenseKV,
    GrowingKV,
    KVView,
    Mask,
    PerHeadFP8KV,
    QuantizedKV,
    Unsupported,
)
from saccade.core.formats import FP8
from saccade.ops.attention.checks import (
    check_kinds,
    check_masks,
    check_numbers,
    check_offset,
    check_packed,
    check_queries,
    check_scores,
    check_traceable,
    is_nested_jvp,
)
from saccade.ops.attention.known import Known
from saccade.ops.kv_write.hadamard import hadamard_transform

MANY_QUERIES = 16  # more of them than this is prefill, up to it decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCall:
    """One attention problem; see `saccade.attention` for the meaning of each field.

    Attributes:
        q: `[B, H, Lq, D]`; float8_e4m3fn stands for `q * q_scale`.  Not Hadamard-transformed,
            whatever the view: `attend` does that where it has to be done.
        q_scale: float32 `[B, H]`, None for 1.
        kv: a view of keys and values with Hkv heads, H a multiple of Hkv.
        q_offset: position of the first query: an int, or int64 `[B]` where rows differ.
        attn_mask: bool `[B | 1, H | 1, Lq, Lk]`, True = visible (for masks of other
            libraries that have no structure); intersected with everything else.
        wants_lse: the caller reads the lse.
        training: whether gradients are needed; None: what autograd says of the tensors.
        known: what calls of the same signature have worked out; None for a signature of its own.

    Raises:
        TypeError, ValueError, Unsupported: parts that do not fit together.  A call that exists can
            be run: no kernel reads beyond its tensors.
    """

    q: Tensor
    kv: KVView
    mask: Mask
    scale: float
    q_offset: int | Tensor
    softcap: float | None = None
    sink_logits: Tensor | None = None
    alibi_slopes: Tensor | None = None
    key_padding: Tensor | None = None
    kv_lens: Tensor | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None
    blocks: BlockSelection | None = None
    attn_mask: Tensor | None = None
    wants_lse: bool = True
    q_scale: Tensor | None = None
    training: bool | None = None
    known: Known | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_kinds(self.q, self.kv, self.mask)
        check_queries(self.q, self.kv, self.q_scale)
        check_traceable(*self.floats, *self._others)
        check_offset(self.q, self.q_offset)
        masks = (self.key_padding, self.kv_lens, self.blocks, self.attn_mask)
        check_masks(self.q, self.kv, *masks)
        check_scores(self.q, self.scale, self.softcap, self.sink_logits, self.alibi_slopes)
        if self.cu_seqlens is not None:
            check_packed(self.q, self.kv, self.cu_seqlens, masks)

    @property
    def floats(self) -> tuple[Tensor, ...]:
        """The tensors that a gradient could flow to."""
        own = (self.q, self.q_scale, self.sink_logits, self.alibi_slopes)
        return *[x for x in own if x is not None], *self.kv.floats

    @property
    def _others(self) -> tuple[object, ...]:
        """Everything else that may be a tensor."""
        blocks = self.blocks.allowed if isinstance(self.blocks, BlockSelection) else None
        sequences = self.cu_seqlens if isinstance(self.cu_seqlens, tuple) else ()
        own = (self.q_offset, self.key_padding, self.kv_lens, self.attn_mask, blocks)
        return *own, *sequences

    @property
    def group_rows(self) -> int:
        """Rows that share a KV head's keys: query heads of a group times queries."""
        return self.num_groups * self.q.shape[2]

    @property
    def num_groups(self) -> int:
        """Query heads that share one KV head."""
        return self.q.shape[1] // self.kv.shape[1]

    @property
    def is_plain_storage(self) -> bool:
        """Whether slot i of dense storage holds position i."""
        return isinstance(self.kv, DenseKV) and self.kv.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether the Mask alone decides which pairs are visible, alike in all rows of a batch."""
        extras = (self.key_padding, self.kv_lens, self.cu_seqlens, self.blocks, self.attn_mask)
        return not isinstance(self.q_offset, Tensor) and all(extra is None for extra in extras)

    @property
    def needs_grad(self) -> bool:
        """Whether gradients are needed."""
        if self.training is not None:
            return self.training
        if not torch.is_grad_enabled():
            return False
        return any(x.requires_grad for x in self.floats)

    @property
    def has_tangents(self) -> bool:
        """Whether a tensor carries a tangent of forward-mode differentiation (torch.func.jvp).

        Under another transformation inside of a jvp (torch.func.hessian) tangents are not seen on
        the tensors, so all tensors count there.
        """
        if torch.compiler.is_compiling() or forward_ad._current_level < 0:
            return False
        duals = (forward_ad.unpack_dual(x) for x in self.floats)
        return is_nested_jvp() or any(dual.tangent is not None for dual in duals)

    @property
    def out_dtype(self) -> torch.dtype:
        """Dtype of the output: that of the queries, bfloat16 where they are fp8."""
        return torch.bfloat16 if self.q.dtype == FP8 else self.q.dtype

    def queries(self, start: int, stop: int) -> Tensor:
        """Queries start .. stop-1 as numbers `[B, H, stop - start, D]`, float32 at least."""
        q = self.q[:, :, start:stop]
        q = q.float() if q.dtype == FP8 else q.to(torch.promote_types(q.dtype, torch.float32))
        return q if self.q_scale is None else q * self.q_scale[..., None, None]

    def q_bounds(self, start: int, stop: int) -> tuple[int, int]:
        """Smallest and largest position of the queries start .. stop-1 over the batch."""
        if isinstance(self.q_offset, Tensor) and self.q_offset.numel():
            if self.q_offset.is_meta:
                raise Unsupported(
                    "positions in a meta tensor cannot be read. Pass q_offset as an int, or "
                    "tensors with memory."
                )
            low, high = torch.aminmax(self.q_offset)
            return int(low) + start, int(high) + stop - 1
        first = 0 if isinstance(self.q_offset, Tensor) else self.q_offset
        return first + start, first + stop - 1

    def q_positions(self, start: int, stop: int) -> Tensor:
        """Positions of the queries start .. stop-1, int64 `[B | 1, 1, stop - start]`."""
        index = torch.arange(start, stop, device=self.q.device)
        if isinstance(self.q_offset, Tensor):
            return (index[None] + self.q_offset[:, None])[:, None]
        return (index + self.q_offset)[None, None]

    def transformed(self) -> AttentionCall:
        """The call over Hadamard-transformed keys as one over plain ones: q is transformed too.

        Its output has still to be transformed.
        """
        kv: Any = self.kv
        if not kv.hadamard:
            return self
        if isinstance(kv, PerHeadFP8KV):
            plain = replace(kv, qdata=replace(kv.qdata, hadamard=False))
        elif isinstance(kv, GrowingKV):
            plain = replace(kv, stored=replace(kv.stored, hadamard=False))
        else:
            plain = replace(kv, hadamard=False)
        return self.with_(q=hadamard_transform(self.q), kv=plain)

    def in_query_dtype(self) -> AttentionCall:
        """The call for kernels of one dtype: the newest keys of a float32 model wait in float16."""
        kv = self.kv
        if not isinstance(kv, QuantizedKV | GrowingKV) or kv.dtype == self.q.dtype:
            return self
        return self.with_(kv=kv.in_dtype(self.q.dtype))

    def with_(self, **changes: object) -> AttentionCall:
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def dtype_refusal(call: AttentionCall) -> str | None:
    """Why kernels that read `call.in_query_dtype()` cannot, or None."""
    if isinstance(call.kv, QuantizedKV | GrowingKV):
        return None
    for x in call.kv.floats[:2]:  # keys and values
        if call.q.dtype != x.dtype:
            return f"q is {call.q.dtype} but keys or values are {x.dtype}"
    return None


def known_again(
    known: Known,
    q: Tensor,
    kv: KVView,
    q_offset: int | Tensor,
    others: tuple[Any, ...],
) -> AttentionCall:
    """A call whose signature was checked before: only the numbers in its tensors are checked.

    Args:
        others: as in `known.signature_of`.
    """
    sink_logits, alibi_slopes, key_padding, kv_lens, blocks, attn_mask, _ = others
    check_numbers(q, kv, kv_lens, q_offset)
    call = object.__new__(AttentionCall)
    values = (
        q, kv, known.mask, known.scale, q_offset, known.softcap, sink_logits, alibi_slopes,
        key_padding, kv_lens, None, blocks, attn_mask, known.wants_lse, None, None, known,
    )  # fmt: skip
    for put, value in zip(_PUT, values, strict=True):
        put(call, value)
    return call


# Writes the fields of a frozen call, in their order, at a third of what its constructor costs.
_PUT = tuple(getattr(AttentionCall, each.name).__set__ for each in fields(AttentionCall))
