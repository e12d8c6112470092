"""The correctness gate: a kernel whose result is wrong is never timed.

The reference is attention in float64 over the same keys and values as the view stores.  The allowed
error is measured too: an eager run in the storage type is compared with the same reference, and
twice its error is allowed.  Errors count relative to their own row (late rows of a
causal prefill average over many keys and are small), once as the largest of a row and once as a
root mean square over everything; the second one notices a scale that is wrong by a per cent.

Large problems are checked on a random subset of query rows, one from each section of the queries,
and on rows where the mask changes; that every output lies between the smallest and largest value is
checked for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.bench.cases import Case
from saccade.bench.inputs import Inputs
from saccade.core import KVView, Mask, QuantizedKV
from saccade.core.kv import dense
from saccade.ops.kv_write.hadamard import hadamard_transform

ALL_ROWS = 1.5e10  # floating-point operations up to which every row is checked
NUM_ROWS = 96
HARMLESS = 4e-6  # of a row's largest element, for float32: order of summation, last bits of exp


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate found.

    Attributes:
        error: worst error as a multiple of what is allowed; above 1 is wrong.
        reason: what is wrong, "" where nothing is.
    """

    error: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor as it has to be, on some of its rows.

    Attributes:
        rows: indices along the length; exact: float64 `[1, H, R, D]`.
        row_limit: `[1, H, R, 1]`, largest allowed error of an element.
        rms_limit: largest allowed root mean square error, in units of `row_size`.
        row_size: `[1, H, R, 1]`, root mean square of each exact row.
        bounds: smallest and largest value of any element of the full tensor, or None.
    """

    name: str
    rows: Tensor
    exact: Tensor
    row_limit: Tensor
    row_size: Tensor
    rms_limit: float
    bounds: tuple[float, float] | None = None

    def judge(self, got: Tensor) -> Verdict:
        """Compare the full tensor `[1, H, L, D]` with what is expected."""
        if not bool(got.isfinite().all()):
            return Verdict(float("inf"), f"{self.name} has elements that are not finite")
        if self.bounds is not None:
            low, high = self.bounds
            if float(got.min()) < low or float(got.max()) > high:
                reason = f"{self.name} has elements beyond every value"
                return Verdict(float("inf"), reason)
        error = (got.detach()[:, :, self.rows].double() - self.exact).abs()
        worst = (error.amax(-1, keepdim=True) / self.row_limit).flatten(1)
        rms = float((error / self.row_size).square().mean().sqrt()) / self.rms_limit
        largest = float(worst.max())
        if largest > 1:
            at = int(worst.argmax())
            head, row = divmod(at, len(self.rows))
            where = f"{self.name}, head {head}, row {int(self.rows[row])}"
            return Verdict(largest, f"{where}: {largest:.3g} times the allowed error")
        if rms > 1:
            return Verdict(rms, f"{self.name}: {rms:.3g} times the allowed mean error")
        return Verdict(max(largest, rms))


class Gate:
    """Expected results of one case, computed once and compared with every backend."""

    def __init__(self, case: Case, inputs: Inputs, *, seed: int = 0) -> None:
        make = _expected_grads if case.work == "backward" else _expected_out
        with torch.no_grad():
            self._expected = make(case, inputs, seed)

    def check(self, result: Tensor | tuple[Tensor, ...]) -> Verdict:
        """Judge an output `[1, H, Lq, Dv]`, or gradients (dq, dk, dv)."""
        parts = result if isinstance(result, tuple) else (result,)
        verdicts = []
        for expected, got in zip(self._expected, parts, strict=True):
            verdicts.append(expected.judge(got))
            if not verdicts[-1].passed:
                return verdicts[-1]
        return max(verdicts, key=lambda verdict: verdict.error)


def rows_to_check(case: Case, seed: int) -> Tensor:
    """All rows of a small problem; else one of each section, and those where masks change."""
    if 4.0 * case.head_dim * case.heads * case.q_len * case.kv_len <= ALL_ROWS:
        return torch.arange(case.q_len)
    source = torch.Generator().manual_seed(seed)
    bounds = torch.linspace(0, case.q_len, NUM_ROWS + 1).long()
    random = torch.rand(NUM_ROWS, generator=source) * (bounds[1:] - bounds[:-1])
    special = [0, 1, case.q_len - 1, *((case.window - 1, case.window) if case.window else ())]
    return torch.cat((bounds[:-1] + random.long(), torch.tensor(special))).unique()


def _expected_out(case: Case, inputs: Inputs, seed: int) -> tuple[Expected, ...]:
    rows = rows_to_check(case, seed)
    offset = case.kv_len - case.q_len
    q, view = inputs.q[:, :, rows], inputs.views[0]
    k, v = stored(view)
    exact = _attend(q.double(), k, v, case.mask, rows + offset, view.hadamard, torch.float64)
    eager = _attend(q.float(), k, v, case.mask, rows + offset, view.hadamard, case.q_dtype)
    margin = 1.0 + 2.0**-6  # rounding to the storage type, of values and of the output
    low, high = (float(limit) for limit in v.aminmax())
    bounds = None if view.hadamard else (min(low * margin, 0.0), max(high * margin, 0.0))
    return (limits("out", rows, exact, eager, case.q_dtype, bounds=bounds),)


def stored(view: KVView) -> tuple[Tensor, Tensor]:
    """Keys and values as the numbers that the storage means, without another rounding."""
    if isinstance(view, QuantizedKV):
        recent_k, recent_v = view.recent_k.float(), view.recent_v.float()
        view = replace(view, recent_k=recent_k, recent_v=recent_v)
    tile = dense(view)
    return tile.k, tile.v


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    positions: Tensor,
    hadamard: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Attention of rows at `positions` in the type of q; weights and output rounded to `dtype`."""
    outs = []
    q = hadamard_transform(q) if hadamard else q
    for queries, keys, values in _heads(q, k, v):
        weights = _weights(queries, keys, mask, positions)
        outs.append(weights.to(dtype).to(q.dtype) @ values.to(dtype).to(q.dtype))
    out = torch.cat(outs)[None].to(dtype).to(q.dtype)
    return hadamard_transform(out) if hadamard else out


def _heads(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Head by head of the keys, to bound memory: `[G, R, D]`, `[N, D]`, `[N, Dv]` in q's type."""
    groups = q.shape[1] // k.shape[1]
    for head in range(k.shape[1]):
        queries = q[0, head * groups : (head + 1) * groups]
        yield queries, k[0, head].to(q.dtype), v[0, head].to(q.dtype)


def _weights(q: Tensor, k: Tensor, mask: Mask, positions: Tensor) -> Tensor:
    """Softmax weights `[G, R, N]`."""
    visible = mask.allows(positions[:, None], torch.arange(k.shape[0])[None])
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill_(~visible, -torch.inf).softmax(-1)


def _expected_grads(case: Case, inputs: Inputs, seed: int) -> tuple[Expected, ...]:
    """dq, dk, dv on all rows: each row of dk depends on every row of q."""
    assert inputs.grad is not None
    q, (k, v), positions = inputs.q, stored(inputs.views[0]), torch.arange(case.q_len)
    exact = _gradients(q.double(), k, v, inputs.grad, case.mask, positions)
    eager = _gradients(q.float(), k, v, inputs.grad, case.mask, positions)
    return tuple(
        # Rows that nearly cancel (dq of the first one is 0) carry the rounding of large terms.
        limits(name, torch.arange(x.shape[2]), x, y, case.q_dtype, least_share=1.0)
        for name, x, y in zip(("dq", "dk", "dv"), exact, eager, strict=True)
    )


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Mask, positions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the book, head by head, in the type of q."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    for head, (queries, keys, values) in enumerate(_heads(q, k, v)):
        douts = grad[0, head * groups : (head + 1) * groups].to(q.dtype)
        weights = _weights(queries, keys, mask, positions)
        dweights = douts @ values.mT
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True)) * scale
        dk = (dscores.mT @ queries).sum(0)
        parts.append((dscores @ keys, dk[None], (weights.mT @ douts).sum(0)[None]))
    dq, dk, dv = (torch.cat(part)[None] for part in zip(*parts, strict=True))
    return dq, dk, dv


def limits(
    name: str,
    rows: Tensor,
    exact: Tensor,
    eager: Tensor,
    dtype: torch.dtype,
    *,
    least_share: float = 0.01,
    bounds: tuple[float, float] | None = None,
) -> Expected:
    """Limits from the error of the eager run; rows smaller than a share of the rest count as it."""
    slack = max(HARMLESS, torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    error = (eager.double() - exact).abs()
    largest = exact.abs().amax(-1, keepdim=True)
    floor = largest.max() if least_share == 1 else least_share * largest.median()
    size = exact.square().mean(-1, keepdim=True).sqrt()
    size = size.clamp_min(least_share * float(size.median()))
    row_limit = 2 * error.amax(-1, keepdim=True) + slack * largest.clamp_min(floor)
    rms_limit = 2 * float((error / size).square().mean().sqrt()) + slack / 4
    return Expected(name, rows, exact, row_limit, size, rms_limit, bounds)
