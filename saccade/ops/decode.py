"""A few new queries against a long cache: the same mathematics as `attend`, for inference."""

from __future__ import annotations

from torch import Tensor

from saccade.core import AttentionOutput, KVView, Mask
from saccade.ops.attend.api import attend

MAX_QUERIES = 16


def decode(
    q: Tensor,
    kv: KVView,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    key_padding: Tensor | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Attention of the newest 1 to 16 tokens over a cache view; the work is reading the cache once.

    Args:
        q: `[batch, heads, q_len, head_dim]`, q_len <= 16: one token, or several speculative ones.
        kv: view of everything stored, the new tokens included.
        mask: default causal.

    The other arguments are those of `attention`.

    Raises:
        ValueError: more than 16 queries; use `attend`.
    """
    if q.shape[2] > MAX_QUERIES:
        raise ValueError(
            f"decode takes at most {MAX_QUERIES} queries, got {q.shape[2]}. Use attend for more."
        )
    return attend(
        q.detach(),
        kv,
        mask=Mask() if mask is None else mask,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        key_padding=key_padding,
        backend=backend,
    )
