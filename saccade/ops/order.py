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
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from saccade.core import BadInput, DenseKV, PagedKV
from saccade.ops import tuning
from saccade.ops.attend import sdpa, triton
from saccade.ops.call import AttentionCall

SCHEMA = "saccade.order/1"
FOLDER = Path(__file__).parent / "measured" / "backends"
PATTERNS = ("causal", "all", "window")
ROWS = ("even", "packed", "lengths", "pages")
WIDEST = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A measured fact: calls like this, and who computes them fastest.

    Attributes:
        order: backends, fastest first.
        why: what was measured, as a clause; source: the record under benchmarks/results.
        kernel: which of PyTorch's kernels was measured as "sdpa"; the rule needs it to be had.
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
        if not (self.fits_shape(call) and self.fits_size(call)):
            return False
        return not self.kernel or sdpa.kernel_of(call) == self.kernel

    def fits_shape(self, call: AttentionCall) -> bool:
        """Whether everything but the size fits."""
        return (
            self.head_dim[0] <= call.q.shape[3] <= self.head_dim[1]
            and pattern_of(call) in self.pattern
            and call.needs_grad == self.training
            and (not self.square or call.q.shape[2] == call.kv.shape[2])
            and kind_of_rows(call) in self.rows
        )

    def fits_size(self, call: AttentionCall) -> bool:
        """Whether it is as long, and fills a card as much, as what was measured."""
        keys = keys_of(call)
        longest = self.max_keys is None or keys <= self.max_keys
        enough = self.min_rows <= rows_of(call) and self.min_queries <= call.q.shape[2]
        return self.min_keys <= keys and longest and enough


def rules_for(device: torch.device) -> tuple[Rule, ...]:
    """The rules of a device, () where nothing was measured."""
    return () if device.type != "cuda" else rules(tuning.architecture(device))


def preferred(call: AttentionCall) -> Rule | None:
    """The first rule that fits the call; inside torch.compile none, which would add guards."""
    if call.q.device.type == "cpu" or torch.compiler.is_compiling():
        return None
    rows = rows_of(call)  # asked first: steps of decoding, most calls and in a hurry, end there
    found = rules_for(call.q.device)
    return next((rule for rule in found if rule.min_rows <= rows and rule.fits(call)), None)


def unmeasured(name: str, call: AttentionCall) -> str:
    """Why a backend that runs only where it was measured is passed over."""
    near = [r for r in rules_for(call.q.device) if name in r.order and r.fits_shape(call)]
    if not near:
        return "it was measured to win only for other calls"
    if call.q.shape[2] < near[0].min_queries:
        return f"it was measured to win only from {near[0].min_queries} queries a row"
    return (
        f"it was measured to win only from {near[0].min_keys} keys and {near[0].min_rows} rows "
        f"(batch x heads x queries), here {keys_of(call)} and {rows_of(call)}"
    )


def pattern_of(call: AttentionCall) -> str:
    """One of PATTERNS: a window that holds every key is none."""
    if not call.mask.causal:
        return "all"
    window = call.mask.window
    return "causal" if window is None or window >= call.kv.shape[2] else "window"


def kind_of_rows(call: AttentionCall) -> str:
    """One of ROWS, or another view's name, for which nothing was measured."""
    if call.cu_seqlens is not None:
        return "packed"
    if isinstance(call.kv, PagedKV):
        return "pages"
    if not isinstance(call.kv, DenseKV):
        return type(call.kv).__name__
    even = call.lengths is None and isinstance(call.q_offset, int)
    return "even" if even else "lengths"


def keys_of(call: AttentionCall) -> int:
    """Keys of a row; of packed documents on average, which the host knows without asking."""
    documents = 1 if call.cu_seqlens is None else max(1, len(call.cu_seqlens[1]) - 1)
    return call.kv.shape[2] // documents


def rows_of(call: AttentionCall) -> int:
    """Rows of the scores, over the batch and all heads."""
    batch, heads, q_len, _ = call.q.shape
    return batch * heads * q_len


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
    strange = [name for name in made.pattern if name not in PATTERNS]
    strange += [name for name in made.rows if name not in ROWS]
    if strange or not made.order or len(made.head_dim) != 2:
        raise ValueError(
            f"pattern takes {', '.join(PATTERNS)}, rows {', '.join(ROWS)}; order needs a backend "
            "and head_dim two numbers"
        )
    return made
