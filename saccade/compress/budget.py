"""How much a policy keeps: a number of keys, a share of them, or bytes."""

from __future__ import annotations

from saccade.units import Bytes

Budget = int | float | Bytes
"""A number of keys of each head, a share of all tokens read, or what all caches may allocate."""


def in_keys(budget: Budget) -> int | float:
    """A budget in keys or as a share: one in bytes has become one in keys before it is used."""
    assert not isinstance(budget, Bytes), "runtime.budgets.budget_in_keys comes first"
    return budget


def resolve_budget(budget: int | float, length: int) -> int:
    """Keys to keep of `length`, 1 to `length`: an int is a number of keys, a float a share."""
    kept = budget if isinstance(budget, int) else round(budget * length)
    return max(1, min(kept, length))
