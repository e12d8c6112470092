"""The rows of the comparison: which options are measured side by side.

Adding a row is one entry here.  The first two rows read the whole context at once and compare
what the textbook compares, the whole score matrix against none; all others read it in chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from saccade.runtime import ContextParams
from saccade.sparse import BlockTopK, Strided

BASELINE = "standard attention"
TOGETHER = "all: YaRN + top-k + tokens 50 % + int8"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpec:
    """One row to measure.

    Attributes:
        heads: None (as the model is), "mha" (KV heads repeated) or "mqa" (KV heads averaged).
        token_share: share of the context's tokens kept by token-level compression.
        quick: whether a quick run measures it too.
    """

    name: str
    group: str
    params: ContextParams
    heads: str | None = None
    token_share: float | None = None
    quick: bool = True

    def options(self) -> dict[str, Any]:
        """What is not default, for the record."""
        default = ContextParams()
        changed = {
            f.name: getattr(self.params, f.name)
            for f in fields(ContextParams)
            if getattr(self.params, f.name) != getattr(default, f.name)
        }
        if self.params.sparse is not None:
            changed["sparse"] = repr(self.params.sparse)
        extra = {"heads": self.heads, "token_share": self.token_share}
        return changed | {name: value for name, value in extra.items() if value is not None}


def unchunked_batch(n_context: int, n_batch: int, num_heads: int, memory: int | None) -> int:
    """Tokens that the first two rows read at once: the whole context if its score matrices fit.

    Textbook attention holds about four float32 matrices `[heads, n, n]` at a time.
    """
    fits = memory is None or 4 * 4 * num_heads * n_context**2 < memory / 2
    return n_context if fits else n_batch


def _row(default_batch: int, name: str, group: str, **options: Any) -> RowSpec:
    extra = {key: options.pop(key) for key in ("heads", "token_share", "quick") if key in options}
    params = partial(ContextParams, n_batch=default_batch, flash_attn="enabled")
    return RowSpec(name=name, group=group, params=params(**options), **extra)


def specs(
    n_context: int, n_batch: int, n_ctx_train: int, unchunked: int | None = None
) -> list[RowSpec]:
    """All rows for a context of `n_context` tokens read in chunks of `n_batch`.

    Args:
        unchunked: tokens that the first two rows read at once; default the whole context.
    """
    unchunked = unchunked or n_context
    window = max(128, n_context // 4)
    top_k = BlockTopK(top=max(4, n_context // 64 // 8))
    # Scaling by two shows what stretching costs inside the trained length.
    stretched = {"n_ctx": 2 * n_ctx_train, "yarn_orig_ctx": n_ctx_train}
    yarn = {"rope_scaling_type": "yarn", **stretched}
    int8 = {"type_k": "int8", "type_v": "int8"}
    int4 = {"type_k": "int4", "type_v": "int4"}
    snapkv = {"kv_policy": "snapkv", "kv_budget": 0.25}
    ada = {"kv_policy": "ada_snapkv", "kv_budget": 0.25}
    row = partial(_row, n_batch)

    return [
        row(BASELINE, "Attention", flash_attn="disabled", n_batch=unchunked),
        row("flash attention", "Attention", n_batch=unchunked),
        row("MHA (KV heads repeated)", "Heads", heads="mha"),
        row("GQA (the model as it is)", "Heads"),
        row("MQA (KV heads averaged)", "Heads", heads="mqa"),
        row(f"window {window}", "Sliding window", n_swa=window),
        row(f"window {window} + 4 sinks", "Sliding window", n_swa=window, n_sinks=4),
        row("sparse: strided", "Sparse", sparse=Strided()),
        row("sparse: block top-k", "Sparse", sparse=top_k),
        row("linear x2", "Positions", rope_scaling_type="linear", **stretched),
        row("NTK x2", "Positions", rope_scaling_type="ntk", **stretched),
        row("YaRN x2", "Positions", **yarn),
        row("tokens kept 50 %", "Compression", token_share=0.5),
        row("SnapKV, KV kept 25 %", "Compression", **snapkv),
        row("Ada-SnapKV, KV kept 25 %", "Compression", **ada, quick=False),
        row("int8 KV", "Quantized KV", **int8),
        row("int4 KV", "Quantized KV", **int4),
        row("YaRN + window + sinks", "Together", n_swa=window, n_sinks=4, **yarn),
        row("YaRN + SnapKV 25 %", "Together", **snapkv, **yarn),
        row(TOGETHER, "Together", sparse=top_k, token_share=0.5, **yarn, **int8),
    ]
