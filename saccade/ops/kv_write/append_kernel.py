"""The kernel behind `append`: a program does RoPE, Hadamard and store for one head of a token."""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from saccade.ops.gpu.intmath import next_power_of_two
from saccade.ops.gpu.launching import on, pdl_options, strided, unit_rows
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.kv_write.hadamard_kernel import unscaled_hadamard
from saccade.ops.kv_write.records import KVSlots, PendingRope


@triton.jit
def write_head(at, to, cos, sin, DIM: tl.constexpr, HALF: tl.constexpr, ROPE: tl.constexpr,
               HADAMARD: tl.constexpr):  # fmt: skip
    """Copy one head from `at` to `to`, with RoPE and the Hadamard transform if enabled."""
    dims = tl.arange(0, HALF)
    inside = dims < DIM // 2
    low = tl.load(at + dims, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + dims + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    if ROPE:
        c_low = tl.load(cos + dims, mask=inside, other=0.0).to(tl.float32)
        c_high = tl.load(cos + dims + DIM // 2, mask=inside, other=0.0).to(tl.float32)
        s_low = tl.load(sin + dims, mask=inside, other=0.0).to(tl.float32)
        s_high = tl.load(sin + dims + DIM // 2, mask=inside, other=0.0).to(tl.float32)
        low, high = low * c_low - high * s_low, high * c_high + low * s_high
    if HADAMARD:
        factor = 1 / tl.sqrt(tl.cast(DIM, tl.float32))
        low, high = (
            unscaled_hadamard(low + high, HALF) * factor,
            unscaled_hadamard(low - high, HALF) * factor,
        )
    tl.store(to + dims, low.to(to.dtype.element_ty), mask=inside)
    tl.store(to + dims + DIM // 2, high.to(to.dtype.element_ty), mask=inside)


@triton.jit
def append_kernel(
    q, k, v, q_out, k_store, v_store, cos, sin, table_batch, table_row, at, origin, heads,
    kv_heads,
    DIM: tl.constexpr, HALF: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_HALF: tl.constexpr,
    ROPE: tl.constexpr, HADAMARD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, head, row): heads of q first (none without ROPE), then of k, then of v."""
    if PDL:  # the next kernel may start now: it waits until this one, which waits too, has ended
        gdc_launch_dependents()
        gdc_wait()
    t = tl.program_id(0).to(tl.int64)  # the only axis of a grid that may exceed 65535
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    slot = tl.load(at + b) + t
    if origin is not None:
        slot -= tl.load(origin)
    cos += b * table_batch + t * table_row
    sin += b * table_batch + t * table_row
    # Pointers of a name have one type in all branches: queries, keys and values may have their own.
    if h < heads:
        q_at = q.ptr + b * q.batch + h.to(tl.int64) * q.head + t * q.row
        q_to = q_out.ptr + b * q_out.batch + h.to(tl.int64) * q_out.head + t * q_out.row
        write_head(q_at, q_to, cos, sin, DIM, HALF, ROPE, False)
    elif h < heads + kv_heads:
        h -= heads
        k_at = k.ptr + b * k.batch + h.to(tl.int64) * k.head + t * k.row
        k_to = k_store.ptr + b * k_store.batch + h.to(tl.int64) * k_store.head + slot * k_store.row
        write_head(k_at, k_to, cos, sin, DIM, HALF, ROPE, HADAMARD)
    else:
        h -= heads + kv_heads
        v_at = v.ptr + b * v.batch + h.to(tl.int64) * v.head + t * v.row
        v_to = v_store.ptr + b * v_store.batch + h.to(tl.int64) * v_store.head + slot * v_store.row
        write_head(v_at, v_to, cos, sin, VALUE_DIM, VALUE_HALF, False, HADAMARD)


def append_by_kernel(
    slots: KVSlots, k: Tensor, v: Tensor | None, rope: PendingRope | None
) -> Tensor | None:
    """`append` by one kernel; without `v`, keys alone."""
    batch, kv_heads, tokens, dim = k.shape
    k = unit_rows(k)
    values = k if v is None else unit_rows(v)
    q = k if rope is None else unit_rows(rope.q)
    heads = 0 if rope is None else q.shape[1]
    out = k if rope is None else torch.empty_like(q)
    cos, sin = (k, k) if rope is None else (rope.cos.contiguous(), rope.sin.contiguous())
    per_row = rope is not None and cos.shape[0] > 1
    with on(k.device):
        launch_kernel(
            append_kernel,
            (tokens, heads + kv_heads * (1 if v is None else 2), batch),
            strided(q),
            strided(k),
            strided(values),
            strided(out),
            strided(slots.k),
            strided(slots.v),
            cos,
            sin,
            cos.stride(0) if per_row else 0,
            dim,
            slots.at,
            slots.origin,
            heads,
            kv_heads,
            DIM=dim,
            HALF=next_power_of_two(dim // 2),
            VALUE_DIM=values.shape[3],
            VALUE_HALF=next_power_of_two(values.shape[3] // 2),
            ROPE=rope is not None,
            HADAMARD=slots.hadamard,
            num_warps=4 if slots.hadamard else 1,
            **pdl_options(k.device),
        )
    return None if rope is None else out
