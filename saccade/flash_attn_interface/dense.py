"""flash_attn_func, and its forms for stacked tensors: sequences of one length, with gradients."""

from __future__ import annotations

from torch import Tensor

from saccade.core import AttentionOutput, DenseKV
from saccade.flash_attn_interface.options import (
    EVERYWHERE,
    Options,
    Window,
    check_layout,
    options_of,
    returned,
    run,
    unpacked,
)

AXES = "batch, seqlen, heads, head_dim"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """softmax(q k^T * scale) v in flash-attn's layout, differentiable.

    With seqlen_q != seqlen_k masks are aligned to the bottom right: query i is at position
    i + seqlen_k - seqlen_q.  Rows that attend to nothing are 0.

    Args:
        q: `[batch, seqlen_q, heads, head_dim]`.
        k, v: `[batch, seqlen_k, kv_heads, ..]`; heads is a multiple of kv_heads.
        dropout_p: has to be 0.
        softmax_scale: default head_dim ** -0.5.
        causal: no query attends to a later key.
        window_size: (left, right), how many keys before and after its position a query attends
            to; -1 for all.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        alibi_slopes: float32 `[heads]` or `[batch, heads]`; adds -slope * distance.
        deterministic: gradients are the same bits every time.
        return_attn_probs: return (out, lse, probabilities) as flash-attn does without dropout:
            lse float32 `[batch, heads, seqlen_q]` (-inf for rows that attend to nothing), and an
            empty tensor, since probabilities are never stored.

    Returns:
        `[batch, seqlen_q, heads, head_dim]` contiguous, or the three tensors.

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
    query, keys, values = check_layout(q, k, v, AXES)
    return returned(dense(query, keys, values, options), query, options)


def dense(q: Tensor, k: Tensor, v: Tensor, options: Options) -> AttentionOutput:
    """Attention over `[batch, seqlen, heads, head_dim]`; its out has that layout too."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    result = run(q, DenseKV(k, v), options)
    return AttentionOutput(result.out.transpose(1, 2).contiguous(), result.lse)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of keys and values in one tensor.

    Args:
        q: `[batch, seqlen_q, heads, head_dim]`.
        kv: `[batch, seqlen_k, 2, kv_heads, head_dim]`.

    The other arguments, what is returned and raised: see `flash_attn_func`.
    """
    k, v = unpacked("kv", kv, "batch, seqlen, 2, kv_heads, head_dim", 2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = EVERYWHERE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """`flash_attn_func` of queries, keys and values in one tensor.

    Args:
        qkv: `[batch, seqlen, 3, heads, head_dim]`.

    The other arguments, what is returned and raised: see `flash_attn_func`.
    """
    q, k, v = unpacked("qkv", qkv, "batch, seqlen, 3, heads, head_dim", 3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )
