"""Which backend is fastest for which calls, as data: rules, what they compare, and their files.

A rule is one line: conditions, backends in their order, why, and the record that shows it.  The
package's rules lie in `measured/backends/ARCHITECTURE.json`: of a GPU ("sm_90"), or of a family of
CPUs ("zen5", see `core.hardware.processor_family`).  `saccade bench tune` measures rules of the
machine that it runs on and writes them into the user's cache folder, or into a file that
SACCADE_RULES names; on machines of that architecture those come first.  A file of the user's that
cannot be read is ignored with a warning: it only says what is fast.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

from saccade.core import BadInput
from saccade.core.user_cache import user_cache

SCHEMA = "saccade.rules/2"
FOLDER = Path(__file__).parent / "measured" / "backends"
VARIABLE = "SACCADE_RULES"
PATTERNS = ("causal", "all", "window")
STORAGE = ("dense", "packed", "kv_lens", "pages", "ring", "quantized")
DTYPES = ("float32", "bfloat16", "float16")
EXTRAS = ("none", "attn_mask", "key_padding", "others")
LARGEST = 2**62
_CHOICES = {"pattern": PATTERNS, "storage": STORAGE, "dtype": DTYPES, "extras": EXTRAS}
_RANGES = ("head_dim", "queries", "keys", "rows", "group_rows")
_UNITS = {
    "queries": "queries a row",
    "keys": "keys",
    "rows": "rows (batch x heads x queries)",
    "group_rows": "rows of a group (query heads of a KV head x queries)",
}


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
        dtype: of queries, one of DTYPES or another.
        extras: of EXTRAS, what changes scores or hides keys besides the pattern: nothing, an
            attn_mask alone, key_padding alone, or anything else.
    """

    head_dim: int
    pattern: str
    training: bool
    storage: str
    queries: int
    keys: int
    rows: int
    group_rows: int
    dtype: str = "bfloat16"
    extras: str = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A measured fact: calls like this, and which backends compute them fastest.

    Attributes:
        order: backends, fastest first.
        why: what was measured, as a clause; source: the record under benchmarks/results, or when
            it was measured.
        kernel: which of PyTorch's kernels `sdpa` has to get (only for an order that begins with
            it).
        head_dim: smallest and largest head dimension.
        pattern, storage, dtype, extras, training: as in Facts.
        square: as many queries as keys.
        queries, keys, rows, group_rows: smallest and largest number, both included.
        place: where the rule was read, as in "rule 3 of zen5.json"; not in files.
    """

    order: tuple[str, ...]
    why: str
    source: str
    kernel: str = ""
    head_dim: tuple[int, int] = (1, LARGEST)
    pattern: tuple[str, ...] = PATTERNS
    storage: tuple[str, ...] = ("dense",)
    dtype: tuple[str, ...] = DTYPES
    extras: tuple[str, ...] = EXTRAS
    training: bool = False
    square: bool = False
    queries: tuple[int, int] = (1, LARGEST)
    keys: tuple[int, int] = (1, LARGEST)
    rows: tuple[int, int] = (1, LARGEST)
    group_rows: tuple[int, int] = (1, LARGEST)
    place: str = ""

    @property
    def fewest_queries(self) -> int:
        """The smallest number of queries of a row that can fit."""
        return max(self.queries[0], self.keys[0]) if self.square else self.queries[0]

    @property
    def cited(self) -> str:
        """The record and the place of the rule, for `explain`."""
        return f"{self.source}, {self.place}" if self.place else self.source

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
            and facts.extras in self.extras
            and (facts.dtype in self.dtype or self.dtype == DTYPES)
        )

    def misses(self, facts: Facts) -> Iterator[str]:
        """What of a call's size lies outside of what was measured, each as a clause."""
        for name, unit in _UNITS.items():
            low, high = getattr(self, name)
            value = getattr(facts, name)
            if value < low:
                yield f"from {low} {unit} on, here {value}"
            elif value > high:
                yield f"up to {high} {unit}, here {value}"


class RuleSet:
    """The rules of one architecture, in their order; which ones fit is cached per Facts.

    Attributes:
        fewest_queries: of a row, from which a rule may change what `auto` takes: it takes the
            backend `cpu` anyway where that can run, so rules that begin with it only explain.
    """

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self.rules = tuple(rules)
        self.fewest_queries = min(
            (rule.fewest_queries for rule in self.rules if rule.order[0] != "cpu"),
            default=LARGEST + 1,
        )
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
        if not any(name in rule.order for rule in self.rules):
            return "no measurement of this machine puts it first"
        near = [rule for rule in self.rules if name in rule.order and rule.fits_kind(facts)]
        if not near:
            return "it was measured to win only for other calls"
        fewest = min((list(rule.misses(facts)) for rule in near), key=len)
        return f"it was measured to win only {'; '.join(fewest)}"


NO_RULES = RuleSet()


@dataclass(slots=True, kw_only=True)
class RuleFile:
    """The contents of a file.

    Attributes:
        architecture: whose rules they are; "" in the package's older files, whose name says it.
        measured: processor, threads, versions, date and command of the measurement.
        trials: the figures behind the rules, for people.
    """

    rules: tuple[Rule, ...]
    architecture: str = ""
    measured: dict[str, Any]
    trials: list[dict[str, Any]]


@cache
def rules(arch: str) -> RuleSet:
    """The rules of an architecture: the user's, then the package's; NO_RULES where it has none.

    Warns:
        UserWarning: the user's file is damaged, and is ignored.
    """
    try:
        user = user_file(arch)
    except BadInput as error:
        # The file stands in place of a line of ours, which would say nothing to its owner.
        said = f"{error} It is ignored; {REMEDY}"
        warnings.warn_explicit(said, UserWarning, str(user_path(arch)), 0)
        user = None
    found = [rule for file in (user, package_file(arch)) if file for rule in file.rules]
    return RuleSet(found) if found else NO_RULES


REMEDY = "delete it, or measure again with: saccade bench tune."


def clear_cache() -> None:
    """Read the files again when they are next needed."""
    rules.cache_clear()
    package_file.cache_clear()


@cache
def package_file(arch: str) -> RuleFile | None:
    """The package's file of an architecture, None where it has none."""
    path = FOLDER / f"{arch}.json"
    return read_file(path) if path.exists() else None


def user_path(arch: str) -> Path:
    """Where the user's rules of an architecture lie: the file of SACCADE_RULES, or the cache."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else user_cache("rules") / f"{arch}.json"


def user_file(arch: str) -> RuleFile | None:
    """The user's rules of an architecture, None where there are none of it.

    Raises:
        BadInput: a file that is no list of rules, or that SACCADE_RULES names and is missing.
    """
    path = user_path(arch)
    if not os.environ.get(VARIABLE) and not path.exists():
        return None
    file = read_file(path)
    return file if file.architecture == arch else None


def read(path: Path) -> tuple[Rule, ...]:
    """The rules of a file.

    Raises:
        BadInput: not such a file; the sentence says which rule is wrong and why.
    """
    return read_file(path).rules


def read_file(path: Path) -> RuleFile:
    """The contents of a file; each rule knows its place in it.

    Raises:
        BadInput: not such a file; the sentence says which rule is wrong and why.
    """
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise ValueError(f'expected "schema": "{SCHEMA}", got {data["schema"]!r}')
        found = cast(list[dict[str, Any]], data["rules"])
        arch, measured = str(data.get("architecture", "")), dict(data.get("measured", {}))
        trials = list(data.get("trials", []))
        rows = [dict(row) for row in found]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path} is not a list of rules: {reason}.") from error
    made: list[Rule] = []
    for at, row in enumerate(rows, 1):
        try:
            made.append(replace(_rule(row), place=f"rule {at} of {_shown(path)}"))
        except (TypeError, ValueError, OverflowError) as error:
            raise BadInput(f"{path}, rule {at}: {error}.") from error
    return RuleFile(rules=tuple(made), architecture=arch, measured=measured, trials=trials)


def to_json(file: RuleFile) -> str:
    """The text of a file, one rule a line."""
    parts = [f' "schema": {json.dumps(SCHEMA)}']
    parts.append(f' "architecture": {json.dumps(file.architecture)}')
    parts.append(f' "measured": {json.dumps(file.measured)}')
    parts.append(_listed("rules", [as_row(rule) for rule in file.rules]))
    if file.trials:
        parts.append(_listed("trials", file.trials))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def as_row(rule: Rule) -> dict[str, Any]:
    """A rule as it stands in a file: without what has its default value."""
    row: dict[str, Any] = {}
    for part in fields(Rule):
        value = getattr(rule, part.name)
        if value == part.default or part.name == "place":
            continue
        if part.name in _RANGES:
            value = [None if value[0] == 1 else value[0], None if value[1] == LARGEST else value[1]]
        row[part.name] = list(value) if isinstance(value, tuple) else value
    return row


def _listed(name: str, rows: list[dict[str, Any]]) -> str:
    return f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"


def _shown(path: Path) -> str:
    """A file for people: its name in the package, its path under ~ elsewhere."""
    if path.parent == FOLDER:
        return path.name
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def _rule(row: dict[str, Any]) -> Rule:
    known = [part.name for part in fields(Rule) if part.name != "place"]
    for name in row:
        if name not in known:
            raise ValueError(f"unknown condition {name!r}; there are {', '.join(known)}")
    parts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
    for name in _RANGES:
        if name in parts:
            parts[name] = _range(name, parts[name])
    for name in ("why", "source", "kernel"):
        if not isinstance(parts.get(name, ""), str):
            raise ValueError(f"{name} must be text, got {parts[name]!r}")
    made = Rule(**parts)
    if made.kernel and made.order[:1] != ("sdpa",):
        raise ValueError("kernel needs an order that begins with sdpa")
    for name, choices in _CHOICES.items():
        given = getattr(made, name)
        if not isinstance(given, tuple) or set(given) - set(choices):
            raise ValueError(f"{name} takes {', '.join(choices)}, got {given!r}")
    order: object = made.order
    if not isinstance(order, tuple) or not order or not all(isinstance(n, str) for n in made.order):
        raise ValueError("order needs a backend")
    return made


def _range(name: str, given: object) -> tuple[int, int]:
    """[smallest, largest] with null for no limit."""
    if not isinstance(given, tuple) or len(cast(tuple[object, ...], given)) != 2:
        raise ValueError(f"{name} must be [smallest, largest], null for no limit, got {given!r}")
    low, high = cast(tuple[Any, Any], given)
    return 1 if low is None else int(low), LARGEST if high is None else int(high)
