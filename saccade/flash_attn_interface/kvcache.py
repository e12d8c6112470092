"""flash_attn_with_kvcache: a step of decoding over a cache that the caller owns.

New keys are written into the caller's cache, in place.  The cache is read where it lies: rows of a
dense one as they are, rows chosen by cache_batch_idx as pages as long as a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import DenseKV, KVView, Unsupported
from saccade.core.check import (
    FLOATS,
    check_bounds,
    check_device,
    check_exactly,
    check_tensor,
    describe,
    extremes,
    integer,
    readable,
    truth,
)
from saccade.flash_attn_interface.dense import AXES
from saccade.flash_attn_interface.options import (
    EVERYWHERE,
    Window,
    call_of,
    check_layout,
    options_of,
    outside_graphs,
)
from saccade.flash_attn_interface.pages import PAGES, check_table, paged_view
from saccade.ops import attend
from saccade.rope.rotary import apply

_INTS = (torch.int32, torch.int64)


@outside_graphs
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYWHERE,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a cache, after writing new keys into it; no gradients, as in flash-attn.

    Args:
        q: `[batch, seqlen_q, heads, head_dim]`; its last query sits at the last key of its row.
        k_cache, v_cache: `[rows, seqlen_cache, kv_heads, ..]`, or with block_table `[pages,
            page_size, kv_heads, ..]`.
        k, v: `[batch, seqlen_new, kv_heads, ..]`, written in place behind the keys of their row.
        rotary_cos, rotary_sin: `[positions, rotary_dim / 2]`; rotate k to its positions in the
            cache, and q from cache_seqlens on (all of q to cache_seqlens where neither causal nor
            a window makes positions matter).  They need k and v.
        cache_seqlens: keys of each row before k is written, an int or int32 `[batch]`; None:
            all of the cache, without k.
        cache_batch_idx: int32 `[batch]`, the row of the cache of each row of q.
        cache_leftpad: int32 `[batch]`, the first key of each row; earlier ones are not seen.
        block_table: int32 `[batch, pages of a row]`, pages of any size.
        rotary_interleaved: pairs are neighbours (GPT-J) instead of halves (NeoX).
        num_splits: changes no result beyond rounding; saccade's kernels choose it themselves.
        return_softmax_lse: return (out, lse), lse float32 `[batch, heads, seqlen_q]`.

    The other arguments: see `flash_attn_func`.

    Returns:
        `[batch, seqlen_q, heads, head_dim]` contiguous, or that and the lse.

    Raises:
        TypeError, ValueError: inputs that do not fit together; on a CPU also rows or pages
            that the cache does not have.
        Unsupported: cache_batch_idx with block_table.
    """
    options = options_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax_lse
    )
    integer("num_splits", num_splits, 0)
    axes = AXES if block_table is None else PAGES
    query = check_tensor("q", q, FLOATS, AXES)
    _, keys, values = check_layout(query, k_cache, v_cache, axes, ("q", "k_cache", "v_cache"))
    cache = _Cache(keys, values, _table(query, keys, cache_batch_idx, block_table))
    with torch.no_grad():
        new = _new(query, cache, k, v)
        stored = _stored(cache_seqlens, cache, query, new)
        kv, kv_lens = _view(cache, stored + _count(new), len(query))
        padding = _padding(cache_leftpad, query, kv)
        if new is not None:
            turn = _rotation(rotary_cos, rotary_sin, rotary_interleaved)
            if turn is not None:
                query = turn.at(query, stored, options.is_local)
                new = turn.at(new[0], stored, True), new[1]
        elif rotary_cos is not None or rotary_sin is not None:
            raise ValueError("rotary_cos and rotary_sin need k and v, whose keys they rotate.")
        turned = query.transpose(1, 2)
        call = call_of(turned, kv, options, kv_lens=kv_lens, key_padding=padding)
        if new is not None:  # all is checked before the cache changes
            _write(cache, new, stored)
        result = attend(call)
    out = result.out.transpose(1, 2).contiguous()
    return (out, result.lse) if options.wants_lse else out


class _Cache(NamedTuple):
    """The caller's cache; `table` says which rows (or pages) a row of q reads, None: its own."""

    k: Tensor
    v: Tensor
    table: Tensor | None

    @property
    def capacity(self) -> int:
        """Keys that a row can hold."""
        pages = 1 if self.table is None else self.table.shape[1]
        return pages * self.k.shape[1]


def _table(q: Tensor, k: Tensor, rows: object, block_table: object) -> Tensor | None:
    """The pages of each row of q, int32 `[batch, pages]`; None for the first rows of the cache."""
    if block_table is not None:
        if rows is not None:
            raise Unsupported(
                "cache_batch_idx cannot be combined with block_table, which names the pages of "
                "each row. Index the rows of block_table instead."
            )
        return check_table(block_table, len(q), q)
    if rows is not None:
        check_exactly("cache_batch_idx", rows, _INTS, (len(q),), q.device)
        assert isinstance(rows, Tensor)
        check_bounds("cache_batch_idx", rows, 0, len(k) - 1)
        return rows.int()[:, None]
    if len(k) < len(q):
        raise ValueError(f"k_cache must have a row for each of the {len(q)} of q, got {len(k)}.")
    return None


def _new(q: Tensor, cache: _Cache, k: object, v: object) -> tuple[Tensor, Tensor] | None:
    """The keys and values to write, checked; None for none."""
    if k is None and v is None:
        return None
    if k is None or v is None:
        raise ValueError("k and v must be given together, got only one of them.")
    found: list[Tensor] = []
    for name, x, stored in (("k", k, cache.k), ("v", v, cache.v)):
        new = check_tensor(name, x, FLOATS, "batch, seqlen_new, kv_heads, head_dim")
        if new.dtype != stored.dtype:
            dtypes = [str(dtype).removeprefix("torch.") for dtype in (stored.dtype, new.dtype)]
            raise TypeError(
                f"{name} must have the dtype of the cache, {dtypes[0]}, got {dtypes[1]}."
            )
        shape = (len(q), found[0].shape[1] if found else new.shape[1], *stored.shape[2:])
        if new.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} to fit the cache, got {describe(new)}.")
        check_device(name, new, q.device)
        found.append(new)
    return found[0], found[1]


def _count(new: tuple[Tensor, Tensor] | None) -> int:
    return 0 if new is None else new[0].shape[1]


def _stored(
    given: object, cache: _Cache, q: Tensor, new: tuple[Tensor, Tensor] | None
) -> int | Tensor:
    """Keys of each row before new ones: an int, or int32 `[batch]`."""
    if given is None:
        if new is not None:
            raise ValueError("k and v need cache_seqlens: where in the cache they are written.")
        return cache.capacity
    longest = given
    if isinstance(given, Tensor):
        check_exactly("cache_seqlens", given, _INTS, (len(q),), q.device)
        check_bounds("cache_seqlens", given, 0, cache.capacity)
        longest = extremes(given)[1] if readable(given) and given.numel() else 0
        given = given.int()
    length = integer("cache_seqlens", longest, 0)
    if length + _count(new) > cache.capacity:
        pages = "the cache" if cache.table is None else "block_table"
        raise ValueError(
            f"cache_seqlens of {length} and {_count(new)} new keys are more than the "
            f"{cache.capacity} keys that a row of {pages} holds. Make it larger."
        )
    return given if isinstance(given, Tensor) else length


def _view(cache: _Cache, lens: int | Tensor, batch: int) -> tuple[KVView, Tensor | None]:
    """The cache as a view, and the keys of each row where the view does not say them."""
    if cache.table is not None:
        longest = None if isinstance(lens, Tensor) else lens
        rows = torch.full((batch,), longest or 0, dtype=torch.int32, device=cache.k.device)
        rows = lens if isinstance(lens, Tensor) else rows
        return paged_view(cache.k, cache.v, cache.table, rows, longest), None
    end = cache.capacity if isinstance(lens, Tensor) else lens
    k, v = (x[:batch, :end].transpose(1, 2) for x in (cache.k, cache.v))
    return DenseKV(k, v), lens.long() if isinstance(lens, Tensor) else None


def _positions(stored: int | Tensor, count: int, device: torch.device) -> Tensor:
    """Positions of tokens behind the stored ones, int64 `[batch | 1, count]`."""
    first = stored.long()[:, None] if isinstance(stored, Tensor) else stored
    return first + torch.arange(count, device=device)[None]


def _write(cache: _Cache, new: tuple[Tensor, Tensor], stored: int | Tensor) -> None:
    """Store keys and values behind those of their row, in place."""
    batch, count = new[0].shape[:2]
    at = _positions(stored, count, cache.k.device).expand(batch, count)
    if cache.table is None:
        rows = torch.arange(batch, device=at.device)[:, None]
    else:
        size = cache.k.shape[1]
        rows, at = cache.table.long().gather(1, at // size), at % size
    cache.k[rows, at] = new[0]
    cache.v[rows, at] = new[1]


def _padding(leftpad: object, q: Tensor, kv: KVView) -> Tensor | None:
    """key_padding `[batch, end]` of caches whose rows begin behind padding."""
    if leftpad is None:
        return None
    check_exactly("cache_leftpad", leftpad, _INTS, (len(q),), q.device)
    assert isinstance(leftpad, Tensor)
    check_bounds("cache_leftpad", leftpad, 0, kv.shape[2])
    return torch.arange(kv.shape[2], device=q.device)[None] >= leftpad[:, None]


class _Rotation(NamedTuple):
    """Rotary tables `[positions, rotary_dim / 2]`, and the layout of pairs."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def at(self, x: Tensor, stored: int | Tensor, advancing: bool) -> Tensor:
        """x `[batch, seqlen, heads, head_dim]` at the positions behind the stored keys.

        Args:
            advancing: False: every token has the first of these positions.
        """
        count = x.shape[1]
        at = _positions(stored, count if advancing else 1, x.device).expand(-1, count)
        check_bounds("a position of rotary_cos", at, 0, len(self.cos) - 1)
        wide = torch.promote_types(x.dtype, torch.float32)  # so that x is rounded once
        cos, sin = self.cos[at].to(wide), self.sin[at].to(wide)
        return apply(x.transpose(1, 2), cos, sin, interleaved=self.interleaved).transpose(1, 2)


def _rotation(cos: object, sin: object, interleaved: bool) -> _Rotation | None:
    truth("rotary_interleaved", interleaved)
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin must be given together, got only one of them.")
    axes = "positions, rotary_dim / 2"
    tables = (check_tensor("rotary_cos", cos, FLOATS, axes),)
    tables += (check_tensor("rotary_sin", sin, FLOATS, axes),)
    return _Rotation(*tables, interleaved)
