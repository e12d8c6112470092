"""Which kernels compute a forward pass that will need gradients, and these gradients.

On Hopper, calls that a measured rule covers (`saccade.ops.attention.rules`) go to the Gluon kernels, whose dQ
is added up in no fixed order; everything else, and everything while
`torch.use_deterministic_algorithms(True)` holds, goes to the Triton kernels, whose gradients are
the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention import rules
from saccade.ops.attention.nvidia.gluon.support import layout_refusal
from saccade.ops.attention.nvidia.gluon_backend import DIMS
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton import launch as triton_launch
from saccade.ops.gpu.support import gluon_refusal

GRADIENT_DIMS = (64, 128)


def forward(problem: Problem) -> AttentionOutput:
    """Output and lse by the faster kernel."""
    if not wins_forward(problem) or forward_refusal(problem) is not None:
        return triton_launch.forward(problem)
    from saccade.ops.attention.nvidia.gluon.prefill import launch as gluon_launch

    return gluon_launch.forward(problem)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta) by the faster kernels, or by those that are deterministic."""
    if not wins_gradients(problem) or gradient_refusal(problem) is not None:
        return triton_launch.backward(problem, out, lse, dout, dlse)
    from saccade.ops.attention.nvidia.gluon.backward import launch as gluon_backward_launch

    return gluon_backward_launch.backward(problem, out, lse, dout, dlse)


def wins_forward(problem: Problem) -> bool:
    """Whether the Gluon forward kernel was measured to win, as in a call without gradient."""
    facts = _facts(problem, training=False)
    return any("gluon" in r.order and r.covers(facts) for r in rules.rules_for(problem.q.device))


def wins_gradients(problem: Problem) -> bool:
    """Whether the Gluon gradients were measured to win."""
    facts = _facts(problem, training=True)
    return any(r.kernel == "gluon" and r.covers(facts) for r in rules.rules_for(problem.q.device))


def _facts(problem: Problem, *, training: bool) -> rules.Facts:
    return rules.facts_about(
        problem.q, problem.num_keys, problem.causal, problem.window, training=training
    )


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
    extras = (problem.slopes, problem.padding, problem.kv_lens, problem.offsets, problem.cu_q)
    reason = gluon_refusal(q.device)
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
