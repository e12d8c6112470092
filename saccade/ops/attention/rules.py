"""Which backend is fastest for which calls: measured rules per GPU architecture, pure data.

`ops/tuning/measured/backends/ARCHITECTURE.json` lists rules; the first one that fits a call says
which backends `dispatch` puts before its usual order.  A rule is one line: conditions, the order,
why, and the record that shows it.  Architectures without a file, and calls that no rule fits, have
the usual order.  Nothing here calls a backend: rules are matched against the `Facts` of a call.

cuDNN is a special case.  It builds a plan for every new shape, about 70 milliseconds of the host's
time and 145 with gradients, while most calls save microseconds to a few milliseconds.  Where
lengths change from call to call the plan costs more than it saves, and `auto` cannot predict that.
So a rule prefers cuDNN only where 16 calls of one shape save more than the plan costs (one pass
over the layers of a small model), or 150 calls for training (five steps of 32 layers), whose shapes
repeat.  `backend="sdpa"` always allows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from saccade.core import BadInput, DenseKV, GrowingKV, PagedKV, QuantizedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.gpu.support import architecture

SCHEMA = "saccade.rules/2"
FOLDER = Path(__file__).parents[1] / "tuning" / "measured" / "backends"
PATTERNS = ("causal", "all", "window")
STORAGE = ("dense", "packed", "kv_lens", "pages", "ring", "quantized")
LARGEST = 2**62


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules compare of a call.

    Attributes:
        head_dim: of queries and keys.
        pattern: of PATTERNS; a window that holds every key is none.
        training: whether gradients are needed.
        storage: of STORAGE, how keys are stored: rows of one length, sequences packed by
            cu_seqlens, rows with kv_lens of their own, pages, a ring's spans, quantized; or the
            name of another view, for which nothing was measured.
        queries, keys: of a row, or of a packed sequence on average.
        rows: batch x heads x queries.
        group_rows: rows that share a KV head's keys: query heads of a group x queries.
    """

    head_dim: int
    pattern: str
    training: bool
    storage: str
    queries: int
    keys: int
    rows: int
    group_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A measured fact: calls like this, and which backends compute them fastest.

    Attributes:
        order: backends, fastest first.
        why: what was measured, as a clause; source: the record under benchmarks/results.
        kernel: which of PyTorch's kernels `sdpa` has to get (only for an order that begins with
            it).
        head_dim: smallest and largest head dimension.
        pattern, storage, training: as in Facts.
        square: as many queries as keys.
        queries, keys, rows, group_rows: smallest and largest number, both included.
    """

    order: tuple[str, ...]
    why: str
    source: str
    kernel: str = ""
    head_dim: tuple[int, int] = (1, LARGEST)
    pattern: tuple[str, ...] = PATTERNS
    storage: tuple[str, ...] = ("dense",)
    training: bool = False
    square: bool = False
    queries: tuple[int, int] = (1, LARGEST)
    keys: tuple[int, int] = (1, LARGEST)
    rows: tuple[int, int] = (1, LARGEST)
    group_rows: tuple[int, int] = (1, LARGEST)

    def fits(self, facts: Facts) -> bool:
        """Whether a call is one of those that were measured, its kernel apart."""
        return self.fits_kind(facts) and not any(self.misses(facts))

    def fits_kind(self, facts: Facts) -> bool:
        """Whether everything but the size fits."""
        return (
            self.head_dim[0] <= facts.head_dim <= self.head_dim[1]
            and facts.pattern in self.pattern
            and facts.training == self.training
            and (not self.square or facts.queries == facts.keys)
            and facts.storage in self.storage
        )

    def misses(self, facts: Facts) -> Iterator[str]:
        """What of a call's size lies outside of what was measured, each as a clause."""
        for name in ("queries", "keys", "rows", "group_rows"):
            low, high = getattr(self, name)
            value = getattr(facts, name)
            if value < low:
                yield f"from {low} {_UNITS[name]} on, here {value}"
            elif value > high:
                yield f"up to {high} {_UNITS[name]}, here {value}"


_UNITS = {
    "queries": "queries a row",
    "keys": "keys",
    "rows": "rows (batch x heads x queries)",
    "group_rows": "rows of a group (query heads of a KV head x queries)",
}


class RuleSet:
    """The rules of one architecture, in their order; which ones fit is cached per Facts."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules = tuple(rules)
        self._fitting: dict[Facts, tuple[Rule, ...]] = {}

    def fitting(self, facts: Facts) -> tuple[Rule, ...]:
        """Those rules that fit a call."""
        found = self._fitting.get(facts)
        if found is None:
            found = tuple(rule for rule in self.rules if rule.fits(facts))
            self._fitting[facts] = found
        return found

    def unmeasured(self, name: str, facts: Facts) -> str:
        """Why `auto` passes over a backend that it takes only where it was measured to win."""
        near = [rule for rule in self.rules if name in rule.order and rule.fits_kind(facts)]
        if not near:
            return "it was measured to win only for other calls"
        fewest = min((list(rule.misses(facts)) for rule in near), key=len)
        return f"it was measured to win only {'; '.join(fewest)}"


NO_RULES = RuleSet()


def rules_for(device: torch.device) -> RuleSet:
    """The rules of a device, NO_RULES where nothing was measured."""
    return NO_RULES if device.type != "cuda" else rules(architecture(device))


def facts_of(call: AttentionCall) -> Facts:
    """What rules compare of a call."""
    batch, heads, queries, dim = call.q.shape
    sequences = 1 if call.cu_seqlens is None else max(1, len(call.cu_seqlens[1]) - 1)
    keys, mask = call.kv.shape[2], call.mask
    pattern = "all"
    if mask.causal:
        pattern = "causal" if mask.window is None or mask.window >= keys else "window"
    return Facts(
        head_dim=dim,
        pattern=pattern,
        training=call.needs_grad,
        storage=storage_of(call),
        queries=queries,
        keys=keys // sequences,
        rows=batch * heads * queries,
        group_rows=call.group_rows,
    )


def storage_of(call: AttentionCall) -> str:
    """One of STORAGE, or another view's name, for which nothing was measured."""
    if call.cu_seqlens is not None:
        return "packed"
    if isinstance(call.kv, PagedKV):
        return "pages"
    if isinstance(call.kv, QuantizedKV | GrowingKV):
        return "quantized"
    if not isinstance(call.kv, DenseKV):
        return type(call.kv).__name__
    if not call.kv.is_plain:
        return "ring"
    even = call.kv_lens is None and isinstance(call.q_offset, int)
    return "dense" if even else "kv_lens"


@cache
def rules(arch: str) -> RuleSet:
    """The rules in the package's file of an architecture, none where it has no file."""
    path = FOLDER / f"{arch}.json"
    return RuleSet(read(path)) if path.exists() else NO_RULES


def read(path: Path) -> tuple[Rule, ...]:
    """The rules of a file.

    Raises:
        BadInput: not such a file; the sentence says which rule is wrong and why.
    """
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f'expected "schema": "{SCHEMA}", got {data["schema"]!r}')
        found = cast(list[dict[str, Any]], data["rules"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a list of rules: {error}.") from error
    made: list[Rule] = []
    for at, row in enumerate(found, 1):
        try:
            made.append(_rule(row))
        except (TypeError, ValueError) as error:
            raise BadInput(f"{path}, rule {at}: {error}.") from error
    return tuple(made)


def _rule(row: dict[str, Any]) -> Rule:
    known = [part.name for part in fields(Rule)]
    for name in row:
        if name not in known:
            raise ValueError(f"unknown condition {name!r}; there are {', '.join(known)}")
    parts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    for name in ("head_dim", "queries", "keys", "rows", "group_rows"):
        if name in parts:
            parts[name] = _range(name, parts[name])
    made = Rule(**parts)
    if made.kernel and made.order[:1] != ("sdpa",):
        raise ValueError("kernel needs an order that begins with sdpa")
    strange = [name for name in made.pattern if name not in PATTERNS]
    strange += [name for name in made.storage if name not in STORAGE]
    if strange or not made.order:
        raise ValueError(
            f"pattern takes {', '.join(PATTERNS)}, storage {', '.join(STORAGE)}; order needs a "
            "backend"
        )
    return made


def _range(name: str, given: object) -> tuple[int, int]:
    """[smallest, largest] with null for no limit."""
    if not isinstance(given, tuple) or len(given) != 2:
        raise ValueError(f"{name} must be [smallest, largest], null for no limit, got {given!r}")
    low, high = given
    return 1 if low is None else int(low), LARGEST if high is None else int(high)
