"""flash_attn_varlen_func, and its forms for stacked tensors: sequences packed one behind another.

The operator computes packed sequences in one call.  Where each of them has slopes of its own, or
sees later keys through a window, every sequence is a call.  Keys in pages (block_table) are read
where they lie, by queries padded to the longest of their sequences.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.core import AttentionOutput, DenseKV
from saccade.core.check import FLOATS, check_device, check_tensor, integer, readable
from saccade.core.host_memo import capturing
from saccade.flash_attn_interface.dense import dense
from saccade.flash_attn_interface.options import (
    EVERYWHERE,
    Options,
    Window,
    check_layout,
    options_of,
    outside_graphs,
    returned,
    run,
    unpacked,
)
from saccade.flash_attn_interface.pages import PAGES, check_table, paged_view
from saccade.ops.attention.checks import numbers

AXES = "tokens, heads, head_dim"


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Attention within each of several packed sequences, differentiable.

    Args:
        q: `[tokens_q, heads, head_dim]`.
        k, v: `[tokens_k, kv_heads, ..]`, or with block_table `[pages, page_size, kv_heads, ..]`.
        cu_seqlens_q, cu_seqlens_k: int32 `[sequences + 1]`, cumulative lengths from 0; tokens
            behind the last sequence are left out, and their output is 0.
        max_seqlen_q, max_seqlen_k: at least the longest sequence.  Over pages on a GPU they are
            taken at their word, so that no number has to be read from it.
        alibi_slopes: float32 `[heads]` or `[sequences, heads]`.
        block_table: int32 `[sequences, pages of a sequence]`, pages of any size.

    The other arguments: see `flash_attn_func`.

    Returns:
        `[tokens_q, heads, head_dim]` contiguous; with return_attn_probs (out, lse float32
        `[heads, tokens_q]`, an empty tensor).

    Raises:
        TypeError, ValueError: inputs that do not fit together.
        Unsupported: dropout, or gradients that cannot be deterministic.
    """
    options = options_of(
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        return_attn_probs,
        dropout_p=dropout_p,
        deterministic=deterministic,
    )
    query = check_tensor("q", q, FLOATS, AXES)
    packs = _Packs(*_checked(cu_seqlens_q, cu_seqlens_k, query), max_seqlen_q, max_seqlen_k)
    if block_table is None:
        query, keys, values = check_layout(q, k, v, AXES)
        result = _over_tokens(query, keys, values, packs, options)
    else:
        _, keys, values = check_layout(query[None], k, v, PAGES)
        table = check_table(block_table, packs.sequences, query)
        result = _over_pages(query, keys, values, packs, table, options)
    return returned(result, query, options)


class _Packs(NamedTuple):
    """Where the sequences lie among packed queries and keys, and how long they are said to be."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: object
    max_k: object

    @property
    def sequences(self) -> int:
        return len(self.cu_q) - 1

    def on_host(
        self, tokens_q: int, tokens_k: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Both cumulative lengths, checked; reads them from their device.

        Args:
            tokens_q, tokens_k: what they may end at; None: pages are checked elsewhere.
        """
        found = numbers(self.cu_q), numbers(self.cu_k)
        given = zip("qk", found, (self.max_q, self.max_k), (tokens_q, tokens_k), strict=True)
        for name, steps, said, tokens in given:
            if steps[0] != 0 or list(steps) != sorted(steps):
                raise ValueError(f"cu_seqlens_{name} must rise from 0, got {list(steps)}.")
            if tokens is not None and steps[-1] > tokens:
                raise ValueError(
                    f"cu_seqlens_{name} must end at {tokens}, the tokens of {name}, or before, "
                    f"got {steps[-1]}."
                )
            longest = _longest(steps)
            if isinstance(said, Tensor) and not readable(said):
                continue  # on a GPU, where reading it would wait; nothing depends on it
            if longest > _length(f"max_seqlen_{name}", said):
                raise ValueError(
                    f"max_seqlen_{name} must be at least the longest sequence, {longest}, "
                    f"got {said}."
                )
        return found


def _longest(steps: tuple[int, ...]) -> int:
    """The longest sequence of cumulative lengths."""
    return max((b - a for a, b in pairwise(steps)), default=0)


def _length(name: str, given: object) -> int:
    """A length that may be a tensor of one number, as flash-attn takes it."""
    return integer(name, given.item() if isinstance(given, Tensor) else given, 0)


def _checked(cu_q: object, cu_k: object, q: Tensor) -> tuple[Tensor, Tensor]:
    """The cumulative lengths, checked but for their numbers."""
    found: list[Tensor] = []
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        found.append(check_tensor(name, cu, (torch.int32, torch.int64), "sequences + 1"))
        check_device(name, found[-1], q.device)
    if len(found[0]) != len(found[1]) or len(found[0]) == 0:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must have one number more than sequences, got "
            f"{len(found[0])} and {len(found[1])}."
        )
    return found[0], found[1]


def _over_tokens(
    q: Tensor, k: Tensor, v: Tensor, packs: _Packs, options: Options
) -> AttentionOutput:
    """Attention over packed keys: out `[tokens, heads, value_dim]`, lse `[heads, tokens]`."""
    apart = _is_apart(packs.sequences, options)
    if not apart and (torch.compiler.is_compiling() or capturing(q.device)):
        return _at_once(q, k, v, packs, options)  # where numbers cannot be read
    steps_q, steps_k = packs.on_host(len(q), len(k))
    tokens, used = len(q), (q[: steps_q[-1]], k[: steps_k[-1]], v[: steps_k[-1]])
    if apart:
        result = _one_by_one(*used, list(pairwise(steps_q)), list(pairwise(steps_k)), options)
    else:
        result = _at_once(*used, packs, options)
    unused = tokens - len(result.out)
    if not unused:
        return result
    out = pad(result.out, (0, 0, 0, 0, 0, unused))
    return AttentionOutput(out, pad(result.lse, (0, unused), value=-torch.inf))


def _is_apart(sequences: int, options: Options) -> bool:
    """Whether every sequence has to be a call."""
    slopes = options.alibi_slopes
    if slopes is not None and slopes.ndim == 2 and len(slopes) not in (1, sequences):
        raise ValueError(
            f"alibi_slopes must have shape [heads] or [{sequences}, heads], a row for every "
            f"sequence, got {list(slopes.shape)}."
        )
    several = slopes is not None and slopes.ndim == 2 and len(slopes) > 1
    return several or (options.is_local and options.right != 0)


def _at_once(q: Tensor, k: Tensor, v: Tensor, packs: _Packs, options: Options) -> AttentionOutput:
    """One call for all sequences."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    result = run(q, DenseKV(k, v), options, cu_seqlens=(packs.cu_q, packs.cu_k))
    return AttentionOutput(result.out[0].transpose(0, 1).contiguous(), result.lse[0])


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: list[tuple[int, int]],
    keys: list[tuple[int, int]],
    options: Options,
) -> AttentionOutput:
    """A call for every sequence."""
    slopes = options.alibi_slopes
    outs, lses = [q.new_empty(0, q.shape[1], v.shape[2])], [q.new_empty(q.shape[1], 0).float()]
    for i, (rows, columns) in enumerate(zip(queries, keys, strict=True)):
        own = options if slopes is None else replace(options, alibi_slopes=_row(slopes, i))
        keys_of, values_of = k[slice(*columns)], v[slice(*columns)]
        out, lse = dense(q[slice(*rows)][None], keys_of[None], values_of[None], own)
        outs.append(out[0])
        lses.append(lse[0])
    return AttentionOutput(torch.cat(outs), torch.cat(lses, dim=1))


def _row(slopes: Tensor, sequence: int) -> Tensor:
    """The slopes `[heads]` of a sequence."""
    return slopes if slopes.ndim == 1 else slopes[min(sequence, len(slopes) - 1)]


@outside_graphs
def _over_pages(
    q: Tensor, k: Tensor, v: Tensor, packs: _Packs, table: Tensor, options: Options
) -> AttentionOutput:
    """Attention over pages: out `[tokens, heads, value_dim]`, lse `[heads, tokens]`.

    The queries of a sequence are the last of their row, so they sit at the end of its keys.
    """
    longest, most = _length("max_seqlen_q", packs.max_q), _length("max_seqlen_k", packs.max_k)
    if readable(packs.cu_q):
        steps, _ = packs.on_host(len(q), None)
        longest = _longest(steps)
    view = paged_view(k, v, table, packs.cu_k.diff().int(), most)
    tokens = torch.arange(len(q), device=q.device)
    ends = packs.cu_q[1:].long()
    rows = torch.searchsorted(ends, tokens, right=True)
    unused = rows == len(ends)
    rows = rows.clamp(max=len(ends) - 1)
    columns = (tokens - ends[rows] + longest).clamp(0, longest - 1)
    source = ends[:, None] + torch.arange(-longest, 0, device=q.device)
    padded = q[source.clamp(0, len(q) - 1)].transpose(1, 2)
    out, lse = run(padded, view, options)
    out = out.transpose(1, 2)[rows, columns].masked_fill(unused[:, None, None], 0)
    lse = lse.transpose(1, 2)[rows, columns].masked_fill(unused[:, None], -torch.inf)
    return AttentionOutput(out, lse.t().contiguous())


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of keys and values in one tensor.

    Args:
        q: `[tokens_q, heads, head_dim]`.
        kv: `[tokens_k, 2, kv_heads, head_dim]`.

    The other arguments, what is returned and raised: see `flash_attn_varlen_func`.
    """
    k, v = unpacked("kv", kv, "tokens, 2, kv_heads, head_dim", 2)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` of queries, keys and values in one tensor.

    Args:
        qkv: `[tokens, 3, heads, head_dim]`.
        cu_seqlens, max_seqlen: of queries and of keys.

    The other arguments, what is returned and raised: see `flash_attn_varlen_func`.
    """
    q, k, v = unpacked("qkv", qkv, "tokens, 3, heads, head_dim", 3)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
