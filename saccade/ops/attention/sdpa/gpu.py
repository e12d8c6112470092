"""PyTorch's fused attention kernels on a GPU, each called by name.

scaled_dot_product_attention chooses among them and silently falls back to its "math" path, which
materializes the scores.  Here the kernel is chosen explicitly, and a call that none of them can
run is refused with the reason.  The names are those of torch.nn.attention: cuDNN, FlashAttention-2
("flash") and the memory-efficient one ("efficient"), which alone takes a mask and float32.

cuDNN builds a plan for every new shape, about 70 milliseconds of the host's time and 145 with
gradients (benchmarks/results/h200_rules.json).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.gpu.launching import aligned, tma_aligned

Kind = Literal["all", "square", "end"]
"""Masks that need no memory: "all" keys are visible to every query; "square" is causal with as many
queries as keys; "end" is causal with the queries at the end of more keys."""

HALVES = (torch.bfloat16, torch.float16)
HOPPER, BLACKWELL = (9, 0), (10, 0)
CUDNN = 90000  # the first version that PyTorch uses for attention
CUDNN_WIDE = 91000  # head_dim above 128, on Hopper
CUDNN_WRONG_GRADIENTS = (91000, 91001)  # known to be wrong (cudnn-frontend refuses them too)


def in_rows(x: Tensor) -> Tensor:
    """`x` with a unit last stride and rows apart; on a GPU at multiples of 16 bytes too.

    It is copied where it is not so.  PyTorch's public function checks that before it calls a
    kernel; the kernels themselves read other memory, fail with a misaligned address, or hand BLAS
    a row stride that it refuses without computing anything.
    """
    unit = x.stride(3) == 1 or x.shape[3] == 1
    apart = x.stride(2) >= x.shape[3] or x.shape[2] == 1
    if unit and apart and (not x.is_cuda or aligned(x, 16)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def choose(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, *, needs_grad: bool
) -> tuple[str | None, str]:
    """(name of the kernel that runs an unmasked call, why the others do not)."""
    capability = torch.cuda.get_device_capability(q.device)
    cudnn_first = capability in (HOPPER, BLACKWELL)
    names = ("cudnn", "flash") if cudnn_first else ("flash", "cudnn")
    reasons: list[str] = []
    for name in (*names, "efficient"):
        reason = REFUSALS[name](q, k, v, kind, capability, needs_grad)
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, capability: tuple[int, int], needs_grad: bool
) -> str | None:
    version = torch.backends.cudnn.version() or 0
    if not torch.backends.cuda.cudnn_sdp_enabled() or version < CUDNN:
        return f"not available here (version {version})"
    if kind == "end":
        return "its causal mask is aligned to the first key, not to the last"
    wide = capability == HOPPER and version >= CUDNN_WIDE
    reason = _halves(q, v, capability, 256 if wide else 128)
    if reason is not None:
        return reason
    if k.shape[2] < 2 or q.shape[2] == 0 or max(q.shape[:2]) > 65535:
        return "it takes no empty queries and no single key"
    if not all(map(tma_aligned, (q, k, v))):
        return "it needs rows at distinct multiples of 16 bytes"
    if needs_grad and version in CUDNN_WRONG_GRADIENTS:
        return f"its version {version} is known for wrong gradients"
    if needs_grad and torch.are_deterministic_algorithms_enabled():
        return "its gradients are not deterministic"
    return None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, capability: tuple[int, int], needs_grad: bool
) -> str | None:
    if not torch.backends.cuda.flash_sdp_enabled():
        return "switched off"
    if q.shape[3] != v.shape[3]:
        return "it needs value_dim equal to head_dim"
    if min(q.shape[2], k.shape[2]) == 0:
        return "it takes no empty queries or keys"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return "it needs a unit last stride"
    small = capability not in ((8, 0), HOPPER, BLACKWELL)
    return _halves(q, v, capability, 192 if needs_grad and small else 256)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, capability: tuple[int, int], needs_grad: bool
) -> str | None:
    if kind == "end":
        return "its causal mask is aligned to the first key, not to the last"
    return masked_refusal(q, k, v)


def masked_refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the memory-efficient kernel, the only one with a mask, cannot run, or None."""
    if not torch.backends.cuda.mem_efficient_sdp_enabled():
        return "switched off"
    if q.dtype not in (*HALVES, torch.float32):
        return f"no fused kernel takes {q.dtype}"
    if q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "bfloat16 needs an Ampere or newer"
    step = 16 // q.element_size()
    if q.shape[3] % step or v.shape[3] % step:
        return f"head_dim {q.shape[3]} is not a multiple of {step}"
    if min(q.shape[2], k.shape[2]) == 0:
        return "it takes no empty queries or keys"
    return None


REFUSALS = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient}


def _halves(q: Tensor, v: Tensor, capability: tuple[int, int], limit: int) -> str | None:
    """Requirements of cuDNN and FlashAttention alike: dtypes and head dimensions."""
    if capability < (8, 0):
        return "the GPU is older than Ampere"
    if q.dtype not in HALVES:
        return f"{q.dtype} is not one of bfloat16, float16"
    for dim in (q.shape[3], v.shape[3]):
        if dim % 8 or dim > limit:
            return f"head_dim {dim} is not a multiple of 8 up to {limit}"
    return None


def unmasked(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float
) -> AttentionOutput:
    """One kernel over keys with Hkv heads; the lse is float32 `[B, H, Lq]`."""
    q, k, v = (in_rows(x) for x in (q, k, v))
    if name == "efficient":
        return by_groups(q, k, v, None, causal=causal, scale=scale)
    if name == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return AttentionOutput(out, lse.reshape(q.shape[:3]))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scale
    )
    return AttentionOutput(out, lse[:, :, : q.shape[2]])


def by_groups(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, *, causal: bool, scale: float
) -> AttentionOutput:
    """The memory-efficient kernel, once for each query head of a group: it does not support GQA.

    Repeating the keys would take one launch and their memory once more a query head.
    """
    groups = q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (-1, groups))
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for g in range(groups):
        bias = None if added is None else _bias(added, g, groups, queries[:, :, g], k)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            queries[:, :, g], k, v, bias, True, 0.0, causal, scale=scale
        )
        outs.append(out)
        lses.append(lse[:, :, : q.shape[2]])
    return AttentionOutput(torch.stack(outs, 2).flatten(1, 2), torch.stack(lses, 2).flatten(1, 2))


def _bias(added: Tensor, g: int, groups: int, q: Tensor, k: Tensor) -> Tensor:
    """The additive mask of one head of each group, its rows padded to 16 bytes for the kernel."""
    if added.shape[1] > 1:
        added = added.unflatten(1, (-1, groups))[:, :, g]
    width = k.shape[2]
    step = 16 // added.element_size()
    padded = torch.nn.functional.pad(added, (0, -width % step))[..., :width]
    return padded.expand(q.shape[0], q.shape[1], -1, -1)
