"""Backend `fa3`: FlashAttention-3, where one of its two packages is installed.

`flash_attn_3` is flash-attn's own (its folder hopper), `fa3-fwd` a build of its forward pass alone
without windows, pages and float16.  What a build lacks is read from the flags that it ships.

It has a kernel for absorbed multi-head latent attention (MLA, arXiv 2405.04434), where values are
the first 512 of a key's 576 channels: it reads those once, for both products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.peers import installed
from saccade.ops.attention.peers.problem import (
    ALL_KEYS,
    PeerCall,
    dims_refusal,
    forward_of,
    pattern_of,
    peer_call,
    result,
    shared_refusal,
)


class Build(NamedTuple):
    """Modules of one package, and the namespace of its operators."""

    interface: str
    flags: str
    operators: str


BUILDS = (
    Build("flash_attn_interface", "flash_attn_config", "flash_attn_3"),
    Build("fa3_fwd_interface", "fa3_fwd_config", "fa3_fwd"),
)
_TILES = (64, 96, 128, 192, 256)  # head dimensions that its kernels are made for


def refusal(call: AttentionCall) -> str | None:
    """Why FlashAttention-3 cannot run this call, or None."""
    reason = installed.gpu_refusal(call.q.device, installed.HOPPER, installed.HOPPER)
    if reason is not None:
        return reason
    build = _build()
    if build is None:
        return "the package flash_attn_3 or fa3-fwd is not installed"
    reason = shared_refusal(call) or _dims_refusal(call)
    if reason is None and call.alibi_slopes is not None:
        reason = "it has no ALiBi"
    return reason or _build_refusal(call, build) or installed.import_refusal(build.interface)


def _build() -> Build | None:
    """The package that is taken: the whole one before the forward pass."""
    return next((build for build in BUILDS if installed.is_found(build.interface)), None)


def _is_latent(call: AttentionCall) -> bool:
    """Whether values are the first channels of keys, in the same memory, as in absorbed MLA."""
    kv, (dim, value_dim) = call.kv, call.kv.shape[3:]
    if not 256 <= value_dim <= 512 or not 0 < dim - value_dim <= 64 or not isinstance(kv, DenseKV):
        return False
    starts = kv.k.storage_offset(), kv.v.storage_offset()
    same = torch._C._is_alias_of(kv.k, kv.v)  # type: ignore[attr-defined]
    return same and starts[0] == starts[1] and kv.k.stride() == kv.v.stride()


def _dims_refusal(call: AttentionCall) -> str | None:
    """Its kernels for values of another width than keys."""
    dim, value_dim = call.q.shape[3], call.kv.shape[4]
    if _is_latent(call):
        if call.needs_grad or call.softcap is not None or call.mask.window is not None:
            return "where values are channels of keys it has no gradients, softcap and windows"
        return f"head_dim {dim} is not a multiple of 8" if dim % 8 or value_dim % 8 else None
    reason = dims_refusal(call)
    if reason is not None or dim == value_dim:
        return reason
    if call.needs_grad:
        return "its gradients need value_dim equal to head_dim"
    if dim <= 64 or (128 < dim <= 192 and 96 < value_dim <= 128):
        return None
    return f"it has no kernel for values of {value_dim} channels beside keys of {dim}"


def _build_refusal(call: AttentionCall, build: Build) -> str | None:
    """What this build was made without."""
    missing = _missing(build)
    pattern, (dim, value_dim) = pattern_of(call), call.kv.shape[3:]
    assert not isinstance(pattern, str)
    dim = dim - value_dim if _is_latent(call) else dim
    needed = {
        "FP16": (call.q.dtype == torch.float16, "float16"),
        "LOCAL": (pattern.left != ALL_KEYS, "windows"),
        "SOFTCAP": (call.softcap is not None, "softcap"),
        "VARLEN": (call.cu_seqlens is not None, "packed sequences"),
        "BACKWARD": (call.needs_grad, "gradients"),
        "HDIMDIFF64": (dim <= 64 and value_dim != dim, "values of another width"),
        "HDIMDIFF192": (dim > 64 and value_dim != dim, "values of another width"),
    }
    lacking = [name for flag, (is_needed, name) in needed.items() if is_needed and flag in missing]
    if not any(dim <= tile and f"HDIM{tile}" not in missing for tile in _TILES):
        lacking.append(f"head_dim {dim}")
    return f"this build of it ({build.operators}) has no {lacking[0]}" if lacking else None


def _missing(build: Build) -> set[str]:
    """Names of what a build was made without, as in FLASHATTENTION_DISABLE_FP16."""
    if not installed.is_found(build.flags):
        return set()
    flags: dict[str, bool] = installed.load(build.flags).CONFIG["build_flags"]
    return {name.rpartition("DISABLE_")[2] for name, is_set in flags.items() if is_set}


def run(call: AttentionCall) -> AttentionOutput:
    """Attention by FlashAttention-3; gradients by its own backward pass."""
    build = _build()
    assert build is not None
    interface = installed.load(build.interface)
    given = peer_call(call)
    if call.needs_grad:
        return result(call, _differentiable(interface, given), None)
    q, k, options = given.q, given.k, _raw(given)
    if _is_latent(call):
        at = given.v.shape[-1]
        options["q_v"] = q[..., :at]
        q, k = q[..., at:], k[..., at:]
    out, lse, *_ = _operators(build).fwd(q, k, given.v, **options)
    return result(call, out, lse)


def _operators(build: Build) -> Any:
    """What the package has registered with PyTorch."""
    return getattr(torch.ops, build.operators)


def _raw(given: PeerCall) -> dict[str, Any]:
    """Arguments of the operator, which costs the host less than the functions around it.

    `num_splits` 0 lets it split keys among CTAs where queries are few.
    """
    left, right = given.pattern.window_size
    options: dict[str, Any] = {
        "softmax_scale": given.call.scale,
        "is_causal": given.pattern.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": given.call.softcap or 0.0,
        "num_splits": 0,
    }
    return options if given.cu_q is None else options | given.lengths()


def _differentiable(interface: Any, given: PeerCall) -> Tensor:
    """Output through its autograd function; older releases return the lse with it."""
    options = given.options() | {"deterministic": torch.are_deterministic_algorithms_enabled()}
    if given.cu_q is None:
        found = interface.flash_attn_func(given.q, given.k, given.v, **options)
    else:
        options |= given.lengths()
        found = interface.flash_attn_varlen_func(given.q, given.k, given.v, **options)
    return found[0] if isinstance(found, tuple) else found


forward = forward_of(run)
