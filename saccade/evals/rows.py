"""The rows of the comparison: which options are measured side by side.

Adding a row is one entry here.  All rows read the context in chunks of the same n_batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from saccade.runtime import ContextParams
from saccade.runtime.auto_scaling import reaching, trained_reach
from saccade.runtime.model import ModelFacts
from saccade.sparse import BlockTopK, Strided, XAttention

TEXTBOOK = "transformers eager"
SDPA = "transformers sdpa"
FLASH = "flash attention"
MHA, GQA, MQA = "MHA (KV heads repeated)", "GQA (the model as it is)", "MQA (by conversion)"
INT8, INT4 = "int8 KV", "int4 KV"
SNAPKV, KVZIP = "SnapKV, KV kept 25 %", "KVzip, KV kept 25 %"
TOKENS = "tokens kept 50 %"
_AS_IT_IS = "positions past the trained length, as the model is"
_UNTRAINED = "KV heads aligned on activations and merged, without any training"
_CAN_ONLY_COST = "inside the trained length scaling can only cost: it is for longer contexts"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSpec:
    """One row to measure.

    Attributes:
        theirs: None (saccade's Context) or an attention of transformers, "eager" or "sdpa".
        heads: None (as the model is), "mha" (KV heads repeated), "gqa" (has to have groups) or
            "mqa" (converted to one KV head).
        token_share: share of the context's tokens kept by token-level compression.
        quick: whether a quick run measures it too.
        same_as: a row that is measured already and does the same.
        parts: of a combination, the rows that it combines.
        note: what a reader has to know beforehand.
    """

    name: str
    group: str
    params: ContextParams
    theirs: str | None = None
    heads: str | None = None
    token_share: float | None = None
    quick: bool = True
    same_as: str | None = None
    parts: tuple[str, ...] = ()
    note: str = ""

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
        if self.theirs is not None:
            return {"attn_implementation": self.theirs}
        extra = {"heads": self.heads, "token_share": self.token_share}
        return changed | {name: value for name, value in extra.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows for one length of text.

    Attributes:
        specs: in the order in which they are measured.
        exact: the row whose predictions the others should reproduce.
        scaling: a sentence on how positions are scaled, "" inside the trained length.
    """

    specs: list[RowSpec]
    exact: str
    scaling: str = ""


def rows_for(facts: ModelFacts, *, n_context: int, total: int, n_batch: int) -> Rows:
    """All rows for a context of `n_context` tokens, `total` with what is read behind it."""
    plain = ContextParams(n_batch=n_batch)
    if total <= trained_reach(plain, facts):
        return Rows(specs=_inside(facts, plain, n_context), exact=SDPA)
    as_it_is = replace(plain, n_ctx=total)
    specs = [replace(spec, note=_AS_IT_IS) for spec in _attention(plain, as_it_is)]
    scaled, said = reaching(plain, facts, total)
    positions = _positions(facts, scaled, total)
    exact = positions[0].name if positions else SDPA
    others = [
        *_heads(plain, exact if positions else FLASH),
        *_techniques(plain, n_context),
        *_together(plain, n_context),
    ]
    specs += positions
    specs += [replace(spec, params=reaching(spec.params, facts, total)[0]) for spec in others]
    return Rows(specs=specs, exact=exact, scaling=said or "")


def _positions(facts: ModelFacts, scaled: ContextParams, total: int) -> list[RowSpec]:
    """What was chosen, and two other rules; none where positions cannot be scaled."""
    row = partial(RowSpec, group="Positions")
    if scaled.rope_scaling_type is None and scaled.rope_freq_scale is None:
        return []
    if scaled.rope_scaling_type is None:
        return [row(name="the model's own scaling, stretched", params=scaled)]
    factor = f"x{total / trained_reach(ContextParams(), facts):.3g}"
    names = {"yarn": "YaRN", "linear": "linear", "ntk": "NTK"}
    return [
        row(name=f"{name} {factor}", params=replace(scaled, rope_scaling_type=kind))
        for kind, name in names.items()
    ]


def _inside(facts: ModelFacts, plain: ContextParams, n_context: int) -> list[RowSpec]:
    stretched = {"n_ctx": 2 * facts.n_ctx_train, "yarn_orig_ctx": facts.n_ctx_train}
    yarn = replace(plain, rope_scaling_type="yarn", **stretched)
    row = partial(RowSpec, group="Positions", note=_CAN_ONLY_COST)
    positions = [
        row(name="linear x2", quick=False, params=replace(yarn, rope_scaling_type="linear")),
        row(name="NTK x2", quick=False, params=replace(yarn, rope_scaling_type="ntk")),
        row(name="YaRN x2", params=yarn),
    ]
    return [
        *_attention(plain, plain),
        *_heads(plain, FLASH),
        *_techniques(plain, n_context),
        *positions,
        *_together(yarn, n_context, "YaRN x2"),
    ]


def _attention(plain: ContextParams, flash: ContextParams) -> list[RowSpec]:
    return [
        RowSpec(name=TEXTBOOK, group="transformers", params=plain, theirs="eager"),
        RowSpec(name=SDPA, group="transformers", params=plain, theirs="sdpa"),
        RowSpec(name=FLASH, group="Attention", params=flash),
    ]


def _heads(plain: ContextParams, same: str) -> list[RowSpec]:
    row = partial(RowSpec, group="Heads", params=plain)
    return [
        row(name=MHA, heads="mha"),
        row(name=GQA, heads="gqa", same_as=same),
        row(name=MQA, heads="mqa", note=_UNTRAINED),
    ]


def window_of(n_context: int) -> int:
    """The window of the rows with one: a quarter of the context."""
    return max(128, n_context // 4)


def window_name(n_context: int) -> str:
    """The name of the row with a window and sinks."""
    return f"window {window_of(n_context)} + 4 sinks"


def _top_k(n_context: int) -> BlockTopK:
    return BlockTopK(top=max(4, n_context // 64 // 8))


def _techniques(plain: ContextParams, n_context: int) -> list[RowSpec]:
    """Each on its own."""
    window = window_of(n_context)
    ada = replace(plain, kv_policy="ada_snapkv", kv_budget=0.25)

    def row(name: str, group: str, params: ContextParams, **more: Any) -> RowSpec:
        return RowSpec(name=name, group=group, params=params, **more)

    return [
        row(f"window {window}", "Sliding window", replace(plain, n_swa=window), quick=False),
        row(window_name(n_context), "Sliding window", replace(plain, n_swa=window, n_sinks=4)),
        row("sparse: strided", "Sparse", replace(plain, sparse=Strided()), quick=False),
        row("sparse: XAttention", "Sparse", replace(plain, sparse=XAttention()), quick=False),
        row("sparse: block top-k", "Sparse", replace(plain, sparse=_top_k(n_context))),
        row(TOKENS, "Compression", plain, token_share=0.5),
        row(SNAPKV, "Compression", replace(plain, kv_policy="snapkv", kv_budget=0.25)),
        row("Ada-SnapKV, KV kept 25 %", "Compression", ada, quick=False),
        row(KVZIP, "Compression", replace(plain, kv_policy="kvzip", kv_budget=0.25)),
        row(INT8, "Quantized KV", replace(plain, type_k="int8", type_v="int8")),
        row(INT4, "Quantized KV", replace(plain, type_k="int4", type_v="int4")),
    ]


def _together(plain: ContextParams, n_context: int, scaled: str = "") -> list[RowSpec]:
    """Several at once; under `plain`, which the row called `scaled` shows alone."""
    window, alone = window_of(n_context), ((scaled,) if scaled else ())
    before = "YaRN + " if scaled else ""
    windowed = replace(plain, n_swa=window, n_sinks=4)
    snapkv = replace(plain, kv_policy="snapkv", kv_budget=0.25)
    all_of_them = replace(plain, sparse=_top_k(n_context), type_k="int8", type_v="int8")
    row = partial(RowSpec, group="Together")
    return [
        row(name=f"{before}window + sinks, tokens 50 %", params=windowed, token_share=0.5,
            parts=(*alone, window_name(n_context), TOKENS), quick=False),
        row(name=f"{before}SnapKV 25 %, tokens 50 %", params=snapkv, token_share=0.5,
            parts=(*alone, SNAPKV, TOKENS), quick=False),
        row(name=f"all: {before}top-k + tokens 50 % + int8", params=all_of_them, token_share=0.5,
            parts=(*alone, "sparse: block top-k", TOKENS, INT8)),
    ]  # fmt: skip
