"""Launchers of the dense Triton kernels: forward and backward of one Problem."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops import tuning
from saccade.ops.attend.triton.backward import delta_kernel, keys_kernel, queries_kernel
from saccade.ops.attend.triton.forward import forward_kernel
from saccade.ops.attend.triton.problem import Problem, float32, on, unit_rows
from saccade.ops.attend.triton.visits import visits_of
from saccade.ops.tiles import Bounds, Plane, Rules, Terms
from saccade.ops.whole import cdiv, power_of_two


def forward(problem: Problem, out: Tensor | None = None) -> AttentionOutput:
    """Output and lse of a problem over dense keys; `out` may say where the output goes."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, q_len, dim = q.shape
    value_dim = v.shape[3]
    if out is None:
        out = torch.empty(batch, heads, q_len, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return AttentionOutput(out, lse)
    table = tuning.FORWARD if problem.window is None else tuning.FORWARD_SHORT
    table = table if problem.allowed is None else tuning.FORWARD_LISTED
    launch = tuning.pick(table, q, max(dim, value_dim))
    bounds, tiles = bounds_of(problem, launch.block_m, by_keys=False)
    bulk = launch.bulk and _bulk_loads(k, v)
    with on(q.device):
        forward_kernel[(batch * heads, tiles)](
            plane(q),
            plane(k),
            plane(v),
            plane(out),
            lse,
            bounds,
            rules_of(problem),
            terms_of(problem),
            visits_of(problem, tiles, launch.block_m, launch.block_n),
            q_len,
            problem.num_keys,
            problem.q_offset,
            heads,
            heads // k.shape[1],
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            BULK=bulk,
            **constants(problem),
            **schedule(launch),
        )
    return AttentionOutput(out, lse)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta), delta being rowsum(dout * out) - dlse `[B, H, Lq]`."""
    q, k, v = problem.q, problem.k, problem.v
    dq, dk, dv = _like(q), _like(k), _like(v)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel() == 0 or problem.num_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_()
    dout, dlse = unit_rows(dout), dlse.contiguous()
    batch, heads, q_len, _ = q.shape
    size = constants(problem)
    with on(q.device):
        delta_kernel[(batch * heads, cdiv(q_len, 32))](
            plane(out),
            plane(dout),
            lse,
            dlse,
            delta,
            lse2,
            q_len,
            heads,
            VALUE_DIM=size["VALUE_DIM"],
            BLOCK_V=size["BLOCK_V"],
            BLOCK_M=32,
        )
        planes = (plane(q), plane(k), plane(v), plane(dout))
        _keys(problem, planes, dk, dv, lse2, delta)
        _queries(problem, planes, dq, lse2, delta)
    return dq, dk, dv, delta


def _keys(
    problem: Problem, planes: tuple[Plane, ...], dk: Tensor, dv: Tensor, lse2: Tensor, delta: Tensor
) -> None:
    heads, q_len, dim = problem.q.shape[1:]
    launch = tuning.pick(tuning.KEYS, problem.q, max(dim, problem.v.shape[-1]))
    bounds, tiles = bounds_of(problem, launch.block_n, by_keys=True)
    rows = cdiv(q_len, launch.block_m)
    keys_kernel[(dk.shape[0] * dk.shape[1], tiles)](
        *planes,
        plane(dk),
        plane(dv),
        lse2,
        delta,
        bounds,
        rules_of(problem),
        terms_of(problem),
        visits_of(problem, rows, launch.block_m, launch.block_n, by_keys=True),
        q_len,
        problem.num_keys,
        problem.q_offset,
        heads,
        heads // dk.shape[1],
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        BULK=launch.bulk and _bulk_loads(planes[0].ptr, planes[3].ptr),
        **constants(problem),
        **schedule(launch),
    )


def _queries(
    problem: Problem, planes: tuple[Plane, ...], dq: Tensor, lse2: Tensor, delta: Tensor
) -> None:
    batch, heads, q_len, dim = problem.q.shape
    launch = tuning.pick(tuning.QUERIES, problem.q, max(dim, problem.v.shape[-1]))
    bounds, tiles = bounds_of(problem, launch.block_m, by_keys=False)
    queries_kernel[(batch * heads, tiles)](
        *planes,
        plane(dq),
        lse2,
        delta,
        bounds,
        rules_of(problem),
        terms_of(problem),
        visits_of(problem, tiles, launch.block_m, launch.block_n),
        q_len,
        problem.num_keys,
        problem.q_offset,
        heads,
        heads // problem.k.shape[1],
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        **constants(problem),
        **schedule(launch),
    )


def bounds_of(problem: Problem, block: int, *, by_keys: bool) -> tuple[Bounds, int]:
    """Where rows begin and end, and how many tiles of `block` queries (or keys) a row needs.

    Packed documents get a map from tile to document; its size is an upper bound known on the host.
    """
    if problem.cu_q is None or problem.cu_k is None:
        length = problem.num_keys if by_keys else problem.q.shape[2]
        lengths = problem.lengths
        strides = (0, 0)
        if lengths is not None:
            strides = (lengths.stride(0), lengths.stride(1) if lengths.ndim == 2 else 0)
        return Bounds(problem.offsets, lengths, *strides), cdiv(length, block)
    cu = problem.cu_k if by_keys else problem.cu_q
    last = (cu[1:] - cu[:-1] + block - 1).div(block, rounding_mode="floor").cumsum(0)
    total = problem.num_keys if by_keys else problem.q.shape[2]
    tiles = cdiv(total, block) + len(cu) - 1
    index = torch.arange(tiles, device=cu.device)
    document = torch.searchsorted(last, index, right=True)
    document = torch.where(document < len(last), document, -1).to(torch.int32)
    first_tile = torch.nn.functional.pad(last, (1, 0)).to(torch.int32)
    return Bounds(
        cu_q=problem.cu_q, cu_k=problem.cu_k, document=document, first_tile=first_tile
    ), tiles


def plane(x: Tensor) -> Plane:
    """Pointer and strides; a dimension of size 1 is broadcast."""
    batch, head, row = (0 if x.shape[i] == 1 else x.stride(i) for i in (0, 1, 2))
    return Plane(x, batch, head, row)


def rules_of(problem: Problem) -> Rules:
    """Everything but causality that decides who sees whom."""
    padding = None if problem.padding is None else problem.padding.contiguous()
    return Rules(
        problem.window,
        problem.sinks or None,
        padding,
        None if padding is None else padding.stride(0),
        *_grid(problem.foreign),
        *_grid(problem.allowed),
        None if problem.allowed is None else problem.q_block,
        None if problem.allowed is None else problem.k_block,
    )


def _grid(x: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """A plane spread out: nested records would lose strides of 1 on the way into a kernel."""
    return (None,) * 4 if x is None else tuple(plane(unit_rows(x)))


def terms_of(problem: Problem) -> Terms:
    """What turns a product into a score."""
    slopes = float32(problem.slopes)
    by_row = slopes is not None and slopes.ndim == 2
    return Terms(
        scale=float(problem.scale),
        softcap=problem.softcap,
        slopes=slopes,
        slopes_batch=None if slopes is None else (slopes.stride(0) if by_row else 0),
        sinks=float32(problem.sink_logits),
    )


def constants(problem: Problem) -> dict[str, int | bool | str]:
    """Compile-time facts of a problem that all kernels share."""
    dim, value_dim = problem.q.shape[-1], problem.v.shape[-1]
    return {
        "HEAD_DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, power_of_two(dim)),
        "BLOCK_V": max(16, power_of_two(value_dim)),
        "CAUSAL": problem.causal,
        "RAW": problem.raw,
        "PRECISION": "ieee" if problem.q.dtype == torch.float32 else "tf32",
    }


def schedule(launch: tuning.Launch) -> dict[str, int]:
    """How a kernel is compiled and pipelined."""
    found = {"STAGES": launch.stages, "num_warps": launch.warps, "num_stages": launch.stages}
    return found | ({"maxnreg": launch.registers} if launch.registers else {})


def _like(x: Tensor) -> Tensor:
    """Contiguous space for the gradient of `x`, which may be an expanded tensor."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _bulk_loads(*tensors: Tensor) -> bool:
    """Whether the copy engine can read rows of all: 16-byte steps, none broadcast or very long."""
    for x in tensors:
        size = x.element_size()
        steps = (x.data_ptr(), *(x.stride(i) * size for i in (0, 1, 2)))
        aligned = all(step % 16 == 0 for step in steps) and x.stride(2) > 0
        if size != 2 or not aligned or x.shape[3] > 256 or x.shape[2] == 0:
            return False
    allow_scratch()
    return True


def allow_scratch() -> None:
    """Let kernels that describe tensors to the copy engine have memory for it."""
    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
