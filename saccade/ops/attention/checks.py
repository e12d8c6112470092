"""What every AttentionCall is checked for before any kernel runs, whatever the backend.

Nothing here waits for a GPU: numbers in tensors are read on a CPU alone, and cu_seqlens from their
HostMemo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import (
    BlockSelection,
    DenseKV,
    KVView,
    Mask,
    PerHeadFP8KV,
    RaggedKV,
    Unsupported,
)
from saccade.core.check import (
    FLOATS,
    LARGEST_POSITION,
    LAYOUT,
    STORED,
    check_bounds,
    check_device,
    check_exactly,
    check_heads,
    check_tensor,
    describe,
    integer,
    is_plain_tensor,
    number,
)
from saccade.core.host_memo import HostMemo, capturing

Bounds = tuple[Tensor, Tensor]


def check_kinds(q: object, kv: KVView, mask: object) -> None:
    """Raise TypeError unless these are queries, a view and a mask."""
    if not hasattr(kv, "tiles"):
        raise TypeError(
            f"kv must be a view of keys such as DenseKV(k, v), got {describe(kv)}. "
            "Use saccade.attention for plain tensors."
        )
    if not isinstance(mask, Mask):
        raise TypeError(f"mask must be a saccade.Mask, got {describe(mask)}.")
    check_tensor("q", q, STORED, LAYOUT)


def check_queries(q: Tensor, kv: KVView, q_scale: Tensor | None) -> None:
    """Raise ValueError unless queries and their scales fit the view."""
    batch, kv_heads, _, head_dim, _ = kv.shape
    check_heads(q, batch, kv_heads, head_dim)
    if q.device != kv.device:
        raise ValueError(f"q, k and v must share a device, got {q.device} and {kv.device}.")
    if q_scale is not None:
        check_exactly("q_scale", q_scale, (torch.float32,), (batch, q.shape[1]), q.device)


def check_masks(
    q: Tensor,
    kv: KVView,
    key_padding: Tensor | None,
    kv_lens: Tensor | None,
    blocks: BlockSelection | None,
    attn_mask: Tensor | None,
) -> None:
    """Raise unless every mask fits the queries and the view."""
    if key_padding is None and kv_lens is None and blocks is None and attn_mask is None:
        return
    batch, kv_heads, end = kv.shape[:3]
    if key_padding is not None:
        check_exactly("key_padding", key_padding, (torch.bool,), (batch, end), q.device)
    if kv_lens is not None:
        check_exactly("kv_lens", kv_lens, (torch.int64,), (batch,), q.device)
        _check_kv_lens(kv, kv_lens)
    if isinstance(kv, RaggedKV) and (blocks is not None or attn_mask is not None):
        raise Unsupported(
            "blocks and attn_mask need positions that all heads share, and a ragged view has "
            "none. Leave them out, or attend before the cache is compressed."
        )
    if blocks is not None:
        if not isinstance(blocks, BlockSelection):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"blocks must be a BlockSelection, got {describe(blocks)}.")
        blocks.check_fits(q, kv_heads)
        blocks.check_covers(q.shape[2], end)
    if attn_mask is not None:
        _check_attn_mask(attn_mask, q, end)


def _check_attn_mask(attn_mask: object, q: Tensor, end: int) -> None:
    batch, heads, q_len = q.shape[:3]
    good = is_plain_tensor(attn_mask) and attn_mask.dtype == torch.bool and attn_mask.ndim == 4  # type: ignore[attr-defined]
    if good:
        rows, columns, *rest = attn_mask.shape  # type: ignore[attr-defined]
        good = rows in (1, batch) and columns in (1, heads) and rest == [q_len, end]
    if not good:
        raise ValueError(
            f"attn_mask must be bool [{batch} or 1, {heads} or 1, {q_len}, {end}], True where a "
            f"query attends to a key, got {describe(attn_mask)}."
        )
    assert isinstance(attn_mask, Tensor)
    check_device("attn_mask", attn_mask, q.device)


def check_scores(
    q: Tensor,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
) -> None:
    """Raise unless everything that changes the scores is finite and fits the query heads."""
    batch, heads = q.shape[:2]
    number("scale", scale)
    if softcap is not None and not number("softcap", softcap) > 0:
        raise ValueError(f"softcap must be positive, got {softcap}. Use None for no cap.")
    for name, x in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if x is None:
            continue
        shapes = [(heads,)] if name == "sink_logits" else [(heads,), (1, heads), (batch, heads)]
        if not is_plain_tensor(x) or x.dtype not in FLOATS or tuple(x.shape) not in shapes:
            expected = " or ".join(str(list(s)) for s in (shapes[0], shapes[-1])[: len(shapes)])
            raise ValueError(
                f"{name} must have shape {expected} and a floating-point dtype, got {describe(x)}."
            )
        check_device(name, x, q.device)


def check_offset(q: Tensor, q_offset: object) -> None:
    """Raise unless the position of the first query is one number, or int64 `[batch]`."""
    if isinstance(q_offset, Tensor):
        check_exactly("q_offset", q_offset, (torch.int64,), (q.shape[0],), q.device)
        _check_offsets(q, q_offset)
        return
    if isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.SymInt)):
        raise TypeError(
            f"q_offset must be an int or an int64 tensor [batch], got {describe(q_offset)}."
        )
    if torch.compiler.is_compiling():  # would bound symbolic lengths; the operator checks again
        return
    integer("q_offset", q_offset, -LARGEST_POSITION, LARGEST_POSITION - q.shape[2])


def _check_kv_lens(kv: KVView, kv_lens: Tensor) -> None:
    check_bounds("kv_lens", kv_lens, 0, kv.shape[2])


def _check_offsets(q: Tensor, q_offset: Tensor) -> None:
    check_bounds("q_offset", q_offset, -LARGEST_POSITION, LARGEST_POSITION - q.shape[2])


def check_numbers(q: Tensor, kv: KVView, kv_lens: Tensor | None, q_offset: int | Tensor) -> None:
    """Raise where numbers in tensors do not fit, in a call whose signature does."""
    if kv_lens is not None:
        _check_kv_lens(kv, kv_lens)
    if isinstance(q_offset, Tensor):
        _check_offsets(q, q_offset)


def check_packed(q: Tensor, kv: KVView, bounds: Bounds, others: tuple[object, ...]) -> None:
    """Raise unless cumulative lengths fit packed queries and keys, and nothing else has lengths.

    Args:
        others: key_padding, kv_lens, blocks and attn_mask, which cannot be combined with them.
    """
    if not isinstance(bounds, tuple) or len(bounds) != 2:  # pyright: ignore[reportUnnecessaryIsInstance, reportUnnecessaryComparison]
        raise TypeError(
            f"cu_seqlens of an AttentionCall must be two tensors, got {describe(bounds)}."
        )
    if any(extra is not None for extra in others):
        raise Unsupported(
            "cu_seqlens cannot be combined with key_padding, kv_lens, blocks, attn_mask or "
            "q_offset. Pack only the real tokens, or pass a padded batch."
        )
    if q.shape[0] != 1 or not isinstance(kv, DenseKV | PerHeadFP8KV):
        raise ValueError(
            f"cu_seqlens needs one packed row (batch 1) of dense keys, got batch {q.shape[0]} "
            f"and {type(kv).__name__}."
        )
    totals = (q.shape[2], kv.shape[2])
    for name, cu, total in zip(("queries", "keys"), bounds, totals, strict=True):
        check_tensor(f"cu_seqlens for {name}", cu, (torch.int32, torch.int64), "sequences + 1")
        check_device(f"cu_seqlens for {name}", cu, q.device)
        check_cu_seqlens(name, cu, total)
    if bounds[0].shape != bounds[1].shape:
        raise ValueError("cu_seqlens for queries and keys must have the same number of sequences.")


def _numbers(cu: Tensor) -> tuple[int, ...]:
    if cu.is_meta:
        raise Unsupported(
            "cu_seqlens in a meta tensor cannot be read. Pass tensors with memory to compute."
        )
    return tuple(cu.tolist())


numbers = HostMemo(_numbers)  # cumulative lengths as a tuple of the host


def check_cu_seqlens(name: str, cu: Tensor, total: int) -> None:
    """Raise ValueError unless cumulative lengths rise from 0 to `total`.

    While a CUDA graph is captured, only tensors that were read before are checked; meta tensors,
    which are planned with and never computed, hold no numbers.
    """
    if cu.is_meta or (capturing(cu.device) and not numbers.is_current(cu)):
        return
    steps = numbers(cu)
    if not steps or steps[0] != 0 or steps[-1] != total or list(steps) != sorted(steps):
        raise ValueError(
            f"cu_seqlens for {name} must rise from 0 to {total}, the packed length, "
            f"got {list(steps)}."
        )


def check_traceable(*tensors: object) -> None:
    """Raise Unsupported where a transformation would record or map what it cannot see."""
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise Unsupported(
            "torch.jit.trace records tensor operations for one length and cannot record "
            "saccade's kernels. Use torch.compile or torch.export."
        )
    for x in tensors:
        if isinstance(x, Tensor) and x.is_neg():
            raise Unsupported(
                "attention cannot read a tensor whose sign is turned lazily, such as conj().imag. "
                "Call resolve_neg() on it first."
            )
    if torch._C._functorch.peek_interpreter_stack() is None:  # type: ignore[attr-defined]
        return
    if any(isinstance(x, Tensor) and _is_batched(x) for x in tensors):
        raise Unsupported(
            "attention cannot be mapped by torch.vmap. Fold the mapped dimension into the batch "
            "with flatten(0, 1), and split it again with unflatten."
        )


def is_nested_jvp() -> bool:
    """Whether torch.func runs another transformation inside of a forward-mode one."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    kinds = [level.key() for level in functorch.get_interpreter_stack() or ()]
    return functorch.TransformType.Jvp in kinds[:-1]


def _is_batched(x: Tensor) -> bool:
    """Whether a tensor, or what other transformations wrapped, is mapped by vmap."""
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
