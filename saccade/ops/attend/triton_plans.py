"""Plans of decoding steps: launches of one form of call, described once and repeated.

Most of what an eager step costs the host is describing two launches: some forty arguments each, to
which Triton adds finding the kernel that was compiled for such arguments.  For calls of one form
(shapes, strides, alignment and options, all but the number of keys and the positions) the answer
is always the same.  The first call goes the long way and leaves a plan; later ones fill in
pointers, lengths and positions.

Whatever decides how arguments are specialised is part of the form, so a plan is never taken for a
call that would compile another kernel.  Plans hold numbers and compiled kernels, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops import tuning
from saccade.ops.attend.triton_decode import Pages
from saccade.ops.attend.triton_problem import Problem, float32
from saccade.ops.tiles import Bounds, Plane, Rules, Terms, Visits
from saccade.ops.whole import cdiv

LIMIT = 256  # plans; past it all are forgotten, and those that are used come back
NOTHING_LISTED = Visits()
PLANNED = ("cuda",)  # device types


class Prepared(NamedTuple):
    """A compiled kernel, its grid, and the arguments that every call of a form shares."""

    kernel: Any
    grid: tuple[int, int, int]
    fixed: tuple[Any, ...]


class Strides(NamedTuple):
    """Of the Planes a step reads and writes."""

    q: tuple[int, int, int]
    k: tuple[int, int, int]
    v: tuple[int, int, int]
    parts: tuple[int, int, int]
    out: tuple[int, int, int]
    pages: tuple[int | None, ...]
    lengths: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """How keys are shared among programs: at most `most` splits, of at least a tile each.

    Attributes:
        reach: most keys that a row of tiles visits, None for all.
    """

    most: int
    block_n: int
    reach: int | None

    def splits(self, slots: int) -> int:
        """Splits for that many slots."""
        reach = slots if self.reach is None else min(slots, self.reach)
        return max(1, min(self.most, cdiv(reach, self.block_n)))


@dataclass(frozen=True, slots=True)
class Step:
    """The launches of one step with that many splits."""

    splits: int
    scan: Prepared
    merge: Prepared | None
    strides: Strides
    rules: Rules
    terms: Terms

    def run(
        self, problem: Problem, pages: Pages, spans: tuple[int, ...] | None, slots: int
    ) -> AttentionOutput:
        """Attention of a problem of this form; its device is the current one."""
        q, strides = problem.q, self.strides
        batch, heads, q_len, _ = q.shape
        shape = (batch, heads, q_len, problem.v.shape[-1])
        out = torch.empty(shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(shape[:3], dtype=torch.float32, device=q.device)
        at, lse_at = out.data_ptr(), lse.data_ptr()
        if self.merge is not None:  # one allocation for parts and their lse, both at 16 n bytes
            count = self.splits * lse.numel()
            ahead = (count * shape[3] + 3) // 4 * 4
            parts = torch.empty(ahead + count, dtype=torch.float32, device=q.device)
            at, lse_at = parts.data_ptr(), parts.data_ptr() + 4 * ahead
        terms = self.terms
        if problem.sink_logits is not None:
            terms = terms._replace(sinks=float32(problem.sink_logits))
        self.scan.kernel[self.scan.grid](
            Plane(q, *strides.q),
            Plane(problem.k, *strides.k),
            Plane(problem.v, *strides.v),
            Plane(at, *strides.parts),
            lse_at,
            Pages(pages.table, *strides.pages, pages.positions),
            spans,
            Bounds(problem.offsets, problem.lengths, *strides.lengths),
            self.rules,
            terms,
            NOTHING_LISTED,
            q_len,
            slots if pages.positions is not None else problem.num_keys,
            slots,
            problem.q_offset,
            *self.scan.fixed,
        )
        if self.merge is not None:
            self.merge.kernel[self.merge.grid](
                at, lse_at, Plane(out.data_ptr(), *strides.out), lse.data_ptr(), *self.merge.fixed
            )
        return AttentionOutput(out, lse)


@dataclass(slots=True)
class Plan:
    """What calls of one form have in common, and a Step for each number of splits they had."""

    cut: Cut
    steps: dict[int, Step] = field(default_factory=dict)


class Plans:
    """Plans by form, at most LIMIT of them."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Plan] = {}

    def __len__(self) -> int:
        return len(self._known)

    def step(self, form: tuple[Any, ...] | None, slots: int) -> Step | None:
        """The step of such a call, where one like it has been run."""
        plan = None if form is None else self._known.get(form)
        return None if plan is None else plan.steps.get(plan.cut.splits(slots))

    def note(self, form: tuple[Any, ...], cut: Cut, step: Callable[[], Step]) -> None:
        """Remember how a call of that form was launched."""
        if form not in self._known and len(self._known) >= LIMIT:
            self._known.clear()
        made = step()
        self._known.setdefault(form, Plan(cut)).steps[made.splits] = made

    def forget(self) -> None:
        """Drop all plans."""
        self._known.clear()


PLANS = Plans()


def form_of(
    problem: Problem, pages: Pages, spans: tuple[int, ...] | None
) -> tuple[Any, ...] | None:
    """What decides how a call is launched, but for its length; None for calls without a plan."""
    q, k, v = problem.q, problem.k, problem.v
    rare = (problem.padding, problem.foreign, problem.allowed, problem.slopes, problem.cu_q)
    if q.device.type not in PLANNED or any(x is not None for x in rare):
        return None
    paged = pages.table is not None
    rows = k.shape[1:] if paged else (*k.shape[:2], k.shape[2] == 1, k.shape[3])
    of_pages = (_like(pages.table), pages.batch, pages.head, pages.k_page, pages.v_page,
                _like(pages.positions)) if paged else None  # fmt: skip
    return (
        q.device, q.dtype, v.dtype, q.shape, q.stride(), rows, k.stride(), v.shape[-1], v.stride(),
        of_pages,
        q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16,
        _like(problem.lengths), _like(problem.offsets), _like(problem.sink_logits),
        problem.causal, problem.window, problem.sinks, problem.scale, problem.softcap,
        spans is None, tuning.generation(),
    )  # fmt: skip


def _like(x: Tensor | None) -> tuple[Any, ...] | None:
    """What of a small tensor decides how it is passed to a kernel."""
    return None if x is None else (x.dtype, x.stride(), x.data_ptr() % 16)
