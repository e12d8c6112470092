"""Which rows would change nothing for a model, and why: they are not measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from saccade.core import DenseKV
from saccade.evals.rows import RowSpec
from saccade.runtime import ContextParams
from saccade.runtime.model import ModelFacts


def inapplicable(spec: RowSpec, facts: ModelFacts, n_context: int) -> str | None:
    """Why this row is the same as the plain model, as a clause; None: it is measured.

    A combination is measured only where each of its parts does something: otherwise it is another
    combination than its name says.
    """
    return (
        _heads(spec, facts)
        or _no_effect(spec.params, facts)
        or _selects_everything(spec.params, n_context)
    )


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


def _no_effect(params: ContextParams, facts: ModelFacts) -> str | None:
    default, clauses = ContextParams(), without_effect(facts, params)
    changed = [
        f.name for f in fields(params) if getattr(params, f.name) != getattr(default, f.name)
    ]
    return next((clauses[name] for name in changed if name in clauses), None)


def without_effect(facts: ModelFacts, params: ContextParams) -> Mapping[str, str]:
    """{field of ContextParams: why it changes nothing for this model}."""
    found: dict[str, str] = {}
    own = [window for window in facts.windows if window is not None]
    if own and len(own) == len(facts.windows):
        why = f"every layer already slides over {max(own)} tokens"
        found |= dict.fromkeys(("type_k", "type_v", "kv_policy", "sparse"), why)
        if params.n_swa is not None and params.n_swa >= max(own):
            found["n_swa"] = why
    return found


def _selects_everything(params: ContextParams, n_context: int) -> str | None:
    """Whether a pattern leaves out no block, asked of it with random queries and keys."""
    if params.sparse is None:
        return None
    count, generator = min(params.n_batch, n_context), torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, n_context, 8, generator=generator)
    q = torch.randn(1, 1, count, 8, generator=generator)
    selection: Any = params.sparse.select(q, DenseKV(k, k), n_context - count)
    allowed = selection.allowed
    rows = torch.arange(allowed.shape[-2])[:, None] * selection.q_block + n_context - count
    causal = torch.arange(allowed.shape[-1])[None] * selection.k_block <= rows
    if bool((allowed | ~causal).all()):
        return f"at {n_context} tokens the pattern selects every block of keys"
    return None
