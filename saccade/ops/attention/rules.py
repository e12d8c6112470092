"""Which backend is asked first, by measurement: rules per architecture, as data.

`measured/backends/ARCHITECTURE.json` lists rules; the first one that fits a call says which
backends stand before the usual order.  A rule is one line: conditions, the order, why, and the
record that shows it.  Architectures without a file, and calls that no rule fits, have the usual
order.

cuDNN is a special case.  It builds a plan for every new shape, 50 to 70 milliseconds of the host's
time, while a call saves microseconds to a few milliseconds.  Where lengths change from call to
call that never pays, and `auto` cannot know.  So a rule prefers it only where the plan is paid
back within 16 calls of one shape (one pass over the layers of a small model), or within 64 for
training, whose shapes repeat step after step.  By name, `backend="sdpa"`, it is always to be had.

The Triton backend asks the same rules which of its kernels compute what a call that trains needs
(`attend/gluon/training.py`), since what was measured about a kernel is a fact wherever it runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from saccade.core import BadInput, DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia import triton_backend as triton
from saccade.ops.attention.sdpa import backend as sdpa
from saccade.ops.gpu.support import architecture

SCHEMA = "saccade.order/1"
FOLDER = Path(__file__).parents[1] / "tuning" / "measured" / "backends"
PATTERNS = ("causal", "all", "window")
ROWS = ("even", "packed", "lengths", "pages")
WIDEST = 4096
KERNELS_OF = {"sdpa": sdpa, "triton": triton}  # backends that say which kernels a call would get


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules ask of a call.

    Attributes:
        pattern: of PATTERNS.
        training: whether gradients will be asked for.
        queries, keys: of a row; rows: batch x heads x queries.
        kind: of ROWS, or another view's name, for which nothing was measured.
    """

    head_dim: int
    pattern: str
    training: bool
    queries: int
    keys: int
    rows: int
    kind: str = "even"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A measured fact: calls like this, and who computes them fastest.

    Attributes:
        order: backends, fastest first.
        why: what was measured, as a clause; source: the record under benchmarks/results.
        kernel: what was measured as the first backend of the order, and the rule needs it to be
            had: which of PyTorch's kernels as "sdpa", whose gradients as "triton".
        head_dim: smallest and largest head dimension; pattern: of PATTERNS.
        training: whether gradients will be asked for.
        square: as many queries as keys.
        rows: of ROWS, how keys are stored: rows of one length, packed documents, rows of their
            own lengths, pages.
        min_keys, max_keys: of a row, or of a document on average; min_rows: batch x heads x
            queries; min_queries: of a row, fewer being steps of decoding.
    """

    order: tuple[str, ...]
    why: str
    source: str
    kernel: str = ""
    head_dim: tuple[int, int] = (1, WIDEST)
    pattern: tuple[str, ...] = PATTERNS
    training: bool = False
    square: bool = False
    rows: tuple[str, ...] = ("even",)
    min_keys: int = 0
    max_keys: int | None = None
    min_rows: int = 0
    min_queries: int = triton.MANY_QUERIES + 1

    def fits(self, call: AttentionCall) -> bool:
        """Whether the call is one of those that were measured."""
        if not self.covers(facts_of(call)):
            return False
        return not self.kernel or KERNELS_OF[self.order[0]].kernel_of(call) == self.kernel

    def covers(self, facts: Facts) -> bool:
        """Whether pattern and size are those of what was measured."""
        return self.fits_shape(facts) and self.fits_size(facts)

    def fits_shape(self, facts: Facts) -> bool:
        """Whether everything but the size fits."""
        return (
            self.head_dim[0] <= facts.head_dim <= self.head_dim[1]
            and facts.pattern in self.pattern
            and facts.training == self.training
            and (not self.square or facts.queries == facts.keys)
            and facts.kind in self.rows
        )

    def fits_size(self, facts: Facts) -> bool:
        """Whether it is as long, and fills a card as much, as what was measured."""
        longest = self.max_keys is None or facts.keys <= self.max_keys
        enough = self.min_rows <= facts.rows and self.min_queries <= facts.queries
        return self.min_keys <= facts.keys and longest and enough


def rules_for(device: torch.device) -> tuple[Rule, ...]:
    """The rules of a device, () where nothing was measured."""
    return () if device.type != "cuda" else rules(architecture(device))


def preferred(call: AttentionCall) -> Rule | None:
    """The first rule that fits the call; inside torch.compile none, which would add guards."""
    if call.q.device.type == "cpu" or torch.compiler.is_compiling():
        return None
    # Rows are asked first: steps of decoding, most calls and in a hurry, end there.
    rows = call.q.shape[0] * call.q.shape[1] * call.q.shape[2]
    found = rules_for(call.q.device)
    return next((rule for rule in found if rule.min_rows <= rows and rule.fits(call)), None)


def unmeasured(name: str, call: AttentionCall) -> str:
    """Why a backend that runs only where it was measured is passed over."""
    facts = facts_of(call)
    near = [r for r in rules_for(call.q.device) if name in r.order and r.fits_shape(facts)]
    if not near:
        return "it was measured to win only for other calls"
    if facts.queries < near[0].min_queries:
        return f"it was measured to win only from {near[0].min_queries} queries a row"
    return (
        f"it was measured to win only from {near[0].min_keys} keys and {near[0].min_rows} rows "
        f"(batch x heads x queries), here {facts.keys} and {facts.rows}"
    )


def facts_of(call: AttentionCall) -> Facts:
    """What rules ask of a call."""
    mask = call.mask
    facts = facts_about(
        call.q, call.kv.shape[2], mask.causal, mask.window, training=call.needs_grad
    )
    return replace(facts, kind=kind_of_rows(call), keys=keys_of(call))


def kind_of_rows(call: AttentionCall) -> str:
    """One of ROWS, or another view's name, for which nothing was measured."""
    if call.cu_seqlens is not None:
        return "packed"
    if isinstance(call.kv, PagedKV):
        return "pages"
    if not isinstance(call.kv, DenseKV):
        return type(call.kv).__name__
    even = call.kv_lens is None and isinstance(call.q_offset, int)
    return "even" if even else "lengths"


def keys_of(call: AttentionCall) -> int:
    """Keys of a row; of packed documents on average, which the host knows without asking."""
    documents = 1 if call.cu_seqlens is None else max(1, len(call.cu_seqlens[1]) - 1)
    return call.kv.shape[2] // documents


def facts_about(q: Tensor, keys: int, causal: bool, window: int | None, *, training: bool) -> Facts:
    """What rules ask, of queries `[B, H, Lq, D]`; a window that holds every key is none."""
    batch, heads, queries, dim = q.shape
    pattern = "all"
    if causal:
        pattern = "causal" if window is None or window >= keys else "window"
    return Facts(dim, pattern, training, queries, keys, batch * heads * queries)


@cache
def rules(arch: str) -> tuple[Rule, ...]:
    """The rules in the package's file of an architecture, () where there is none."""
    path = FOLDER / f"{arch}.json"
    return read(path) if path.exists() else ()


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
    made = Rule(**parts)
    if made.kernel and made.order[:1] not in {(name,) for name in KERNELS_OF}:
        raise ValueError(f"kernel needs an order that begins with {' or '.join(KERNELS_OF)}")
    strange = [name for name in made.pattern if name not in PATTERNS]
    strange += [name for name in made.rows if name not in ROWS]
    if strange or not made.order or len(made.head_dim) != 2:
        raise ValueError(
            f"pattern takes {', '.join(PATTERNS)}, rows {', '.join(ROWS)}; order needs a backend "
            "and head_dim two numbers"
        )
    return made
