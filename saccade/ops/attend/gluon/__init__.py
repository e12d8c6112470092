"""Attention by a warp-specialised Gluon kernel on Hopper GPUs: prefill over dense keys or pages.

This module is what the chooser loads, on any machine, so it imports Triton only to run.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.attend.gluon import codes as gluon_codes
from saccade.ops.attend.gluon import decode as gluon_decode
from saccade.ops.call import AttentionCall

KEYS = {64: 128, 128: 128, 256: 64}  # keys of a tile, by head dimension
DIMS = tuple(KEYS)
SHORTEST_PAGE = 16
HOPPER = (9, 0)
TRITON = "3.6"  # Gluon is experimental: the kernel is tested with this release only


@cache
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def refusal(call: AttentionCall) -> str | None:
    """Why the kernel cannot run this call, or None."""
    reason = missing(call.q.device)
    if reason is not None:
        return reason
    if gluon_codes.reads(call.kv):
        return gluon_codes.refusal(call)
    if gluon_decode.reads(call):
        return gluon_decode.refusal(call)
    return _problem_refusal(call) or _layout_refusal(call)


def missing(device: torch.device) -> str | None:
    """Why Gluon kernels for Hopper cannot run on a device, or None."""
    if device.type != "cuda":
        return f"tensors are on {device.type}, not on an NVIDIA GPU"
    if torch.cuda.get_device_capability(device) != HOPPER:
        return "the GPU is not a Hopper (compute capability 9.0)"
    if not _triton_version().startswith(TRITON + "."):
        return f"it needs triton {TRITON}, found {_triton_version()}"
    return None


def _problem_refusal(call: AttentionCall) -> str | None:
    """What the kernel does not compute."""
    kv = call.kv
    if not isinstance(kv, PagedKV) and not (isinstance(kv, DenseKV) and kv.is_plain):
        return "it knows plain dense keys and pages, and no other view"
    if call.key_padding is not None or call.attn_mask is not None:
        return "it knows no key_padding and no attn_mask"
    return score_refusal(call) or _page_refusal(call) or _blocks_refusal(call)


def score_refusal(call: AttentionCall) -> str | None:
    """What none of the Gluon kernels computes, whatever its keys are."""
    if call.softcap is not None or call.alibi_slopes is not None:
        return "it knows no softcap and no alibi_slopes"
    if not call.scale > 0:
        return f"scale must be positive, got {call.scale}"
    if call.needs_grad or torch.compiler.is_compiling():
        return "it has no gradient and no torch.compile registration"
    return None


def _page_refusal(call: AttentionCall) -> str | None:
    """A tile of keys has to be whole pages, or to lie in one."""
    dim = call.q.shape[3]
    if not isinstance(call.kv, PagedKV) or dim not in DIMS:
        return None
    keys, size = KEYS[dim], call.kv.page_size
    if (keys % size and size % keys) or size < SHORTEST_PAGE:
        return (
            f"pages of {size} keys are shorter than {SHORTEST_PAGE}, or neither divide its "
            f"tiles of {keys} nor are multiples of them"
        )
    return None


def _blocks_refusal(call: AttentionCall) -> str | None:
    """A tile has to lie in one block of a selection."""
    blocks, dim = call.blocks, call.q.shape[3]
    if blocks is None or dim not in DIMS:
        return None
    if not call.with_(blocks=None).is_plain or not isinstance(call.kv, DenseKV):
        return "it selects blocks of plain dense keys only, the same number for every row"
    keys = KEYS[dim]
    if blocks.q_block % 128 or blocks.k_block % keys:
        return (
            f"blocks of {blocks.q_block} queries x {blocks.k_block} keys are no multiples of "
            f"its tiles of 128 x {keys}"
        )
    return None


def _layout_refusal(call: AttentionCall) -> str | None:
    """What the copy engine and the matrix units do not take."""
    assert isinstance(call.kv, (DenseKV, PagedKV))
    tensors = (call.q, call.kv.k, call.kv.v)
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"{call.q.dtype} is not one of bfloat16, float16"
    if any(x.dtype != call.q.dtype for x in tensors):
        return f"q is {call.q.dtype} but keys are {call.kv.dtype}"
    if call.kv.shape[2] == 0:
        return "there are no keys"
    return layout_refusal(tensors, DIMS)


def layout_refusal(tensors: tuple[Tensor, Tensor, Tensor], dims: tuple[int, ...]) -> str | None:
    """Why queries, keys and values `[B, H, L, D]` cannot be fetched by tiles, or None."""
    for x in tensors:
        if x.shape[3] not in dims or x.shape[3] != tensors[0].shape[3]:
            return f"head_dim {x.shape[3]} is not one of {', '.join(map(str, dims))}"
        if not copyable(x):
            return "the copy engine needs rows at distinct multiples of 16 bytes"
    if any(x.numel() == 0 for x in tensors):
        return "there are no queries or no keys"
    return None


def copyable(x: Tensor) -> bool:
    """Unit last stride, and every other step a positive multiple of 16 bytes."""
    steps = [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
    return (
        x.stride(3) == 1
        and x.data_ptr() % 16 == 0
        and all(step > 0 and step % 16 == 0 for step in steps)
    )


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `refusal` accepts."""
    if gluon_codes.reads(call.kv):
        return gluon_codes.run(call)
    if gluon_decode.reads(call):
        return gluon_decode.run(call)
    from saccade.ops.attend.gluon.launch import forward
    from saccade.ops.attend.triton.problem import dense_problem, problem_of

    kv = call.kv
    # Laid out as the queries are, which models turn into rows of tokens without a copy.
    out = torch.empty_like(call.q)
    if not isinstance(kv, PagedKV):
        return forward(dense_problem(call), out=out)
    lengths = kv.lengths if call.lengths is None else torch.minimum(kv.lengths, call.lengths)
    return forward(problem_of(call, kv.k, kv.v, lengths), table=kv.table, out=out)
