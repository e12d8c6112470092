"""Which kernels compute a forward pass that will need gradients, and these gradients.

On Hopper, plain calls that are as large as what was measured go to the Gluon kernels, whose dQ is
added up in no fixed order; everything else, and everything while
`torch.use_deterministic_algorithms(True)` holds, goes to the Triton kernels, whose gradients are
the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attend import triton_launch
from saccade.ops.attend.gluon import DIMS, layout_refusal, missing
from saccade.ops.attend.triton_problem import Problem

GRADIENT_DIMS = (64, 128)
# The shortest problem that was measured to win: queries of all heads, and keys.
FORWARD_ROWS, FORWARD_KEYS = 32 * 4096, 4096
GRADIENT_ROWS, GRADIENT_KEYS = 32 * 2048, 2048


def forward(problem: Problem) -> AttentionOutput:
    """Output and lse by the faster kernel."""
    large = _large(problem, FORWARD_ROWS, FORWARD_KEYS)
    if not large or forward_refusal(problem) is not None:
        return triton_launch.forward(problem)
    from saccade.ops.attend import gluon_launch

    return gluon_launch.forward(problem)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta) by the faster kernels, or by those that are deterministic."""
    large = _large(problem, GRADIENT_ROWS, GRADIENT_KEYS)
    if not large or gradient_refusal(problem) is not None:
        return triton_launch.backward(problem, out, lse, dout, dlse)
    from saccade.ops.attend import gluon_backward_launch

    return gluon_backward_launch.backward(problem, out, lse, dout, dlse)


def forward_refusal(problem: Problem) -> str | None:
    """Why the Gluon forward kernel cannot compute a problem, or None."""
    return _refusal(problem, DIMS)


def gradient_refusal(problem: Problem) -> str | None:
    """Why the Gluon kernels cannot compute the gradients of a problem, or None."""
    if torch.are_deterministic_algorithms_enabled():
        return "its dQ is added up in no fixed order"
    return _refusal(problem, GRADIENT_DIMS)


def _refusal(problem: Problem, dims: tuple[int, ...]) -> str | None:
    q, k, v = problem.q, problem.k, problem.v
    extras = (problem.slopes, problem.padding, problem.lengths, problem.offsets, problem.cu_q)
    reason = missing(q.device)
    if reason is not None:
        return reason
    if any(x is not None for x in (*extras, problem.allowed, problem.foreign, problem.softcap)):
        return "it knows plain dense keys, with window and sinks, and nothing else"
    if not problem.scale > 0:
        return f"scale must be positive, got {problem.scale}"
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        return f"{q.dtype} is not one of bfloat16, float16"
    reason = layout_refusal((q, k, v), dims)
    if reason is not None:
        return reason
    if problem.q_offset < 0 or problem.q_offset + q.shape[2] > problem.num_keys:
        return f"queries at {problem.q_offset} onwards do not all have a key of their own"
    return None


def _large(problem: Problem, rows: int, keys: int) -> bool:
    batch, heads, q_len, _ = problem.q.shape
    return batch * heads * q_len >= rows and problem.num_keys >= keys
