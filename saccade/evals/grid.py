"""Sets of options that an evaluation scores: every combination of the values asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from saccade.compress import Budget
from saccade.core import BadInput
from saccade.report.evaluation import DENSE
from saccade.runtime import ContextParams
from saccade.sparse import PATTERNS
from saccade.units import Bytes

NONE = "none"
"""Written for a policy, cache type or pattern that is left out."""


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One set of options.

    Attributes:
        name: such as "snapkv 50 %, int8"; it says all that differs from the dense row.
    """

    name: str
    params: ContextParams

    @property
    def options(self) -> dict[str, Any]:
        """What is not default, for the record."""
        default = ContextParams()
        changed = {
            each.name: getattr(self.params, each.name)
            for each in fields(ContextParams)
            if getattr(self.params, each.name) != getattr(default, each.name)
        }
        if isinstance(changed.get("kv_budget"), Bytes):
            changed["kv_budget"] = str(changed["kv_budget"])
        return changed | ({"sparse": repr(changed["sparse"])} if "sparse" in changed else {})


def dense_row(n_batch: int) -> EvalRow:
    """The model as it is."""
    return EvalRow(DENSE, ContextParams(n_batch=n_batch))


def rows_of(
    policies: Sequence[str] = (),
    budgets: Sequence[Budget] = (),
    cache_types: Sequence[str] = (),
    sparse: Sequence[str] = (),
    *,
    n_batch: int = 512,
) -> list[EvalRow]:
    """The combinations, without the one that changes nothing.

    Args:
        policies: names of `kv_policy`, or "none"; budgets: how much each keeps.
        cache_types: of keys and values, "int8", or of both apart, "int8/int4"; or "none".
        sparse: names of patterns, or "none".

    Raises:
        BadInput: a name that does not exist, policies without budgets, budgets without policies,
            or options that contradict each other.
    """
    named = [policy for policy in policies if policy != NONE]
    if bool(named) != bool(budgets):
        got = (", ".join(policies) or "no policy", ", ".join(map(str, budgets)) or "no budget")
        raise BadInput(
            "policies and budgets go together: which keys are kept and how many, got "
            f"{' and '.join(got)}. Give both."
        )
    kept: list[dict[str, Any]] = [{}] if NONE in policies or not named else []
    kept += [{"kv_policy": policy, "kv_budget": much} for policy in named for much in budgets]
    types = [_types(each) for each in cache_types] or [{}]
    patterns = [_pattern(each) for each in sparse] or [{}]
    found: dict[str, EvalRow] = {}
    for parts in product(kept, types, patterns):
        options = {name: value for part in parts for name, value in part.items()}
        if options:
            row = _row(options, n_batch)
            found[row.name] = row
    return list(found.values())


def _row(options: dict[str, Any], n_batch: int) -> EvalRow:
    parts: list[str] = []
    if "kv_policy" in options:
        parts.append(f"{options['kv_policy']} {budget_text(options['kv_budget'])}")
    if "type_k" in options:
        parts.append("/".join(dict.fromkeys((options["type_k"], options["type_v"]))))
    parts += [name for name, kind in PATTERNS.items() if type(options.get("sparse")) is kind]
    try:
        return EvalRow(", ".join(parts), ContextParams(n_batch=n_batch, **options))
    except ValueError as error:
        raise BadInput(str(error)) from error


def budget_text(budget: Budget) -> str:
    """`50 %`, `512 tokens` or `2GiB`."""
    if isinstance(budget, Bytes):
        return str(budget)
    return f"{budget} tokens" if isinstance(budget, int) else f"{100 * budget:.4g} %"


def _types(text: str) -> dict[str, Any]:
    if text == NONE:
        return {}
    key, _, value = text.partition("/")
    return {"type_k": key, "type_v": value or key}


def _pattern(name: str) -> dict[str, Any]:
    if name == NONE:
        return {}
    if name not in PATTERNS:
        raise BadInput(f"no pattern is called {name!r}: expected one of {', '.join(PATTERNS)}.")
    return {"sparse": PATTERNS[name]()}
