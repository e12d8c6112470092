"""Which rows would change nothing for a model, and why: they are not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from saccade.evals.rows import RowSpec
from saccade.runtime import ContextParams
from saccade.runtime.model import ModelFacts
from saccade.runtime.no_effect import without_effect


def inapplicable(spec: RowSpec, facts: ModelFacts, n_context: int) -> str | None:
    """Why this row is the same as the plain model, as a clause; None: it is measured.

    A combination is measured only where each of its parts does something: otherwise it is another
    combination than its name says.
    """
    return _heads(spec, facts) or _no_effect(spec.params, facts, n_context)


def _heads(spec: RowSpec, facts: ModelFacts) -> str | None:
    heads, kv_heads = facts.num_heads, facts.num_kv_heads
    if spec.heads == "mha" and kv_heads == heads:
        return f"each of the {heads} query heads has keys and values of its own already"
    if spec.heads == "gqa" and kv_heads == heads:
        return f"the model is MHA: its {heads} query heads share no keys and values"
    if spec.heads == "gqa" and kv_heads == 1:
        return f"the model caches one KV head for its {heads} query heads: it is MQA"
    if spec.heads == "mqa" and kv_heads == 1:
        return f"the model caches one KV head for its {heads} query heads already"
    return None


def _no_effect(params: ContextParams, facts: ModelFacts, n_context: int) -> str | None:
    """Of the options that make a row what it is; how much it reads decides on some of them."""
    known = params if params.n_ctx is not None else replace(params, n_ctx=n_context)
    clauses = without_effect(facts, known)
    # Of two options that say the same scaling, neither has an effect beside the other.
    scaling = () if facts.positions.rotary else ("rope_scaling_type",)
    return next((clauses[name] for name in (*_TECHNIQUES, *scaling) if name in clauses), None)


_TECHNIQUES: Final = ("n_swa", "sparse", "kv_policy", "type_k")
