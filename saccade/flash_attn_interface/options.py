"""What flash-attn's options mean to saccade's operator, and running it with them.

flash-attn's window `(left, right)` shows a query at position p the keys p - left .. p + right.
That is a causal window of left + right + 1 keys for a query at position p + right, so queries of
two-sided windows are moved, and every kernel with causal windows computes them.  Slopes of ALiBi
depend on the real distance, so with them such a window becomes a boolean mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from saccade.core import AttentionOutput, KVView, Mask, PagedKV, Unsupported
from saccade.core.check import (
    FLOATS,
    LARGEST_POSITION,
    check_tensor,
    describe,
    integer,
    number,
    truth,
)
from saccade.ops import AttentionCall, attend, make_call
from saccade.ops.attention import dispatch

Window = tuple[int, int]
"""Keys to the left and to the right of a query; -1 (any negative number) for all of them."""

EVERYWHERE: Window = (-1, -1)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that flash-attn's functions share, checked.

    Attributes:
        left, right: keys that a query sees before and after its own position; None for all.
        softcap: None for none.
        wants_lse: the lse is returned too.
    """

    scale: float | None
    left: int | None
    right: int | None
    softcap: float | None
    alibi_slopes: Tensor | None
    deterministic: bool
    wants_lse: bool

    @property
    def is_local(self) -> bool:
        """Whether the position of a query decides which keys it sees."""
        return self.left is not None or self.right is not None


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """The function as a break in the graph of torch.compile: views of caches are no operators."""
    return cast(Any, torch.compiler.disable)(function)


def options_of(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    wants_lse: bool,
    *,
    dropout_p: float = 0.0,
    deterministic: bool = False,
) -> Options:
    """The options, checked as far as they do not depend on queries and keys.

    Raises:
        TypeError, ValueError: an argument of another kind.
        Unsupported: dropout.
    """
    if number("dropout_p", dropout_p) != 0:
        raise Unsupported(
            f"dropout_p must be 0, got {dropout_p}: saccade's kernels drop no weights. "
            "Put the model into eval mode, or set its attention dropout to 0."
        )
    left, right = _window(window_size)
    cap = number("softcap", softcap)
    return Options(
        scale=softmax_scale,
        left=left,
        right=0 if truth("causal", causal) else right,
        softcap=cap if cap > 0 else None,
        alibi_slopes=alibi_slopes,
        deterministic=truth("deterministic", deterministic),
        wants_lse=truth("return_attn_probs or return_softmax_lse", wants_lse),
    )


def _window(given: object) -> tuple[int | None, int | None]:
    """(left, right) of a window_size, None for no limit; its numbers may be tensors."""
    if not isinstance(given, tuple | list | Tensor) or len(given) != 2:
        raise TypeError(f"window_size must be (left, right), -1 for all keys, got {given!r}.")
    numbers = [x.item() if isinstance(x, Tensor) else x for x in given]
    left, right = (integer("a number of window_size", x) for x in numbers)
    return _limit(left), _limit(right)


def _limit(keys: int) -> int | None:
    """How many keys a query sees to one side; None for all, as no key is farther than that."""
    return keys if 0 <= keys < LARGEST_POSITION else None


def check_layout(
    q: object, k: object, v: object, axes: str, names: tuple[str, str, str] = ("q", "k", "v")
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, which have to be floating-point tensors of these axes and of one dtype.

    Raises:
        TypeError: they are not.
        ValueError: keys and values of different shapes.
    """
    given = zip(names, (q, k, v), strict=True)
    query, keys, values = (check_tensor(name, x, FLOATS, axes) for name, x in given)
    if not query.dtype == keys.dtype == values.dtype:
        raise TypeError(
            f"{names[0]}, {names[1]} and {names[2]} must have one dtype, got "
            f"{', '.join(str(x.dtype).removeprefix('torch.') for x in (query, keys, values))}."
        )
    if keys.shape[:-1] != values.shape[:-1]:
        raise ValueError(
            f"{names[1]} and {names[2]} must share [{axes.rpartition(',')[0]}], "
            f"got {list(keys.shape)} and {list(values.shape)}."
        )
    return query, keys, values


def unpacked(name: str, packed: object, axes: str, parts: int) -> tuple[Tensor, ...]:
    """The tensors that are stacked in front of the heads, as views.

    Raises:
        TypeError: no such stack.
    """
    x = check_tensor(name, packed, FLOATS, axes)
    if x.shape[-3] != parts:
        raise TypeError(f"{name} must be a tensor [{axes}], got {describe(x)}.")
    return x.unbind(-3)


def run(
    q: Tensor, kv: KVView, options: Options, *, cu_seqlens: tuple[Tensor, Tensor] | None = None
) -> AttentionOutput:
    """Attention of queries at the end of the keys of their row, or sequence; see `call_of`."""
    call = call_of(q, kv, options, cu_seqlens=cu_seqlens)
    return attend(call, backend=_backend_of(call, options))


def call_of(
    q: Tensor,
    kv: KVView,
    options: Options,
    *,
    kv_lens: Tensor | None = None,
    key_padding: Tensor | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | None = None,
) -> AttentionCall:
    """The call of queries at the end of the keys of their row, or sequence.

    Args:
        q: `[batch, heads, q_len, head_dim]`.
        kv_lens, key_padding, cu_seqlens: see `saccade.attention`; with cu_seqlens a window shows
            no later keys.
    """
    pairs = _visible_pairs(q, kv, options, kv_lens)
    return make_call(
        q,
        kv,
        mask=pairs.mask,
        scale=options.scale,
        softcap=options.softcap,
        alibi_slopes=options.alibi_slopes,
        key_padding=key_padding,
        kv_lens=kv_lens,
        cu_seqlens=cu_seqlens,
        attn_mask=pairs.attn_mask,
        q_offset=pairs.q_offset,
        wants_lse=options.wants_lse,
    )


def _backend_of(call: AttentionCall, options: Options) -> str:
    """The backend: "auto", or the one whose gradients on a GPU are the same bits every time.

    Raises:
        Unsupported: its kernels cannot run a call with deterministic=True.
    """
    if not (options.deterministic and call.needs_grad and call.q.is_cuda):
        return "auto"
    reason = dispatch.refusal(call, "triton")
    if reason is not None:
        raise Unsupported(
            f"deterministic=True needs the gradients of the backend triton, but {reason}. "
            "Leave deterministic out."
        )
    return "triton"


class _Pairs(NamedTuple):
    """Which pairs are visible: a mask for queries at an offset (None: at the end of the keys)."""

    mask: Mask
    q_offset: int | Tensor | None = None
    attn_mask: Tensor | None = None


def _visible_pairs(q: Tensor, kv: KVView, options: Options, kv_lens: Tensor | None) -> _Pairs:
    """The window of the options in saccade's terms; see the top of this file."""
    left, right = options.left, options.right
    if left is None and right is None:
        return _Pairs(Mask(causal=False))
    if right == 0:
        return _Pairs(Mask(window=None if left is None else left + 1))
    ends = kv.kv_lens if isinstance(kv, PagedKV) else kv_lens
    q_len, k_len = q.shape[2], kv.shape[2]
    first = k_len - q_len if ends is None else ends.long() - q_len
    if options.alibi_slopes is not None:
        return _Pairs(Mask(causal=False), None, _near(first, q, k_len, left, right))
    beyond = q_len + k_len  # no query is farther from a key
    moved = beyond if right is None else min(right, beyond)
    return _Pairs(Mask(window=None if left is None else left + moved + 1), first + moved)


def _near(
    first: int | Tensor, q: Tensor, k_len: int, left: int | None, right: int | None
) -> Tensor:
    """Keys of the window of each query: bool `[B | 1, 1, q_len, k_len]`."""
    starts = first[:, None, None] if isinstance(first, Tensor) else first
    queries = torch.arange(q.shape[2], device=q.device)[:, None]
    distance = (queries - torch.arange(k_len, device=q.device))[None] + starts
    near = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        near &= distance <= left
    if right is not None:
        near &= distance >= -right
    return near[:, None]


def returned(
    result: AttentionOutput, q: Tensor, options: Options
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """What flash-attn returns: out, or (out, lse, an empty tensor) as it does without dropout."""
    return (result.out, result.lse, q.new_empty(0)) if options.wants_lse else result.out
