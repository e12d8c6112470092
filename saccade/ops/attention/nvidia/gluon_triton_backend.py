"""Backend `gluon_triton`: training with the forward pass by Gluon and the gradients by Triton.

For what the Gluon gradients do not support: head_dim 256, and runs under
`torch.use_deterministic_algorithms(True)`, since Triton's gradients are the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia import gluon_backend, triton_backend
from saccade.ops.attention.nvidia.gluon.backward import support
from saccade.ops.gpu.support import gluon_refusal


def refusal(call: AttentionCall) -> str | None:
    """Why this pair cannot run the call, or None."""
    if torch.compiler.is_compiling() and call.is_plain_storage:
        return None  # becomes an operator, which checks again when it runs
    reason = gluon_refusal(call.q.device)
    if reason is not None:
        return reason
    if not call.needs_grad:
        return "it is for calls that need gradients"
    return support.forward_refusal(call) or triton_backend.refusal(call)


def forward(call: AttentionCall) -> AttentionOutput:
    """Output and lse by the Gluon prefill kernel."""
    return gluon_backend.forward(call)


def backward(
    call: AttentionCall, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta) by Triton: the same bits every time."""
    return triton_backend.backward(call, out, lse, dout, dlse)


run = forward
