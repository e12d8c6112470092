"""Launchers of the dense Triton kernels: forward and backward of one Problem."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.backward import delta_kernel, keys_kernel, queries_kernel
from saccade.ops.attention.nvidia.triton.forward import forward_kernel
from saccade.ops.gpu.intmath import cdiv, power_of_two
from saccade.ops.gpu.kernel_args import MaskArgs, ScoreArgs, SeqlenInfo, StridedTensor
from saccade.ops.gpu.launching import (
    float32,
    on,
    set_tma_allocator,
    strided,
    tma_loadable,
    unit_rows,
)
from saccade.ops.tuning import tables as tuning


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
    table = table if problem.block_mask is None else tuning.FORWARD_LISTED
    launch = tuning.pick(table, q, max(dim, value_dim))
    seqlen_info, tiles = seqlen_info_of(problem, launch.block_m, by_keys=False)
    tma = _use_tma(launch, k, v)
    with on(q.device):
        forward_kernel[(batch * heads, tiles)](
            strided(q),
            strided(k),
            strided(v),
            strided(out),
            lse,
            seqlen_info,
            mask_args_of(problem),
            score_args_of(problem),
            block_lists_of(problem, tiles, launch.block_m, launch.block_n),
            q_len,
            problem.num_keys,
            problem.q_offset,
            heads,
            heads // k.shape[1],
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            TMA=tma,
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
            strided(out),
            strided(dout),
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
        planes = (strided(q), strided(k), strided(v), strided(dout))
        _keys(problem, planes, dk, dv, lse2, delta)
        _queries(problem, planes, dq, lse2, delta)
    return dq, dk, dv, delta


def _keys(
    problem: Problem,
    planes: tuple[StridedTensor, ...],
    dk: Tensor,
    dv: Tensor,
    lse2: Tensor,
    delta: Tensor,
) -> None:
    heads, q_len, dim = problem.q.shape[1:]
    launch = tuning.pick(tuning.KEYS, problem.q, max(dim, problem.v.shape[-1]))
    seqlen_info, tiles = seqlen_info_of(problem, launch.block_n, by_keys=True)
    rows = cdiv(q_len, launch.block_m)
    keys_kernel[(dk.shape[0] * dk.shape[1], tiles)](
        *planes,
        strided(dk),
        strided(dv),
        lse2,
        delta,
        seqlen_info,
        mask_args_of(problem),
        score_args_of(problem),
        block_lists_of(problem, rows, launch.block_m, launch.block_n, by_keys=True),
        q_len,
        problem.num_keys,
        problem.q_offset,
        heads,
        heads // dk.shape[1],
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        TMA=_use_tma(launch, planes[0].ptr, planes[3].ptr),
        **constants(problem),
        **schedule(launch),
    )


def _queries(
    problem: Problem, planes: tuple[StridedTensor, ...], dq: Tensor, lse2: Tensor, delta: Tensor
) -> None:
    batch, heads, q_len, dim = problem.q.shape
    launch = tuning.pick(tuning.QUERIES, problem.q, max(dim, problem.v.shape[-1]))
    seqlen_info, tiles = seqlen_info_of(problem, launch.block_m, by_keys=False)
    queries_kernel[(batch * heads, tiles)](
        *planes,
        strided(dq),
        lse2,
        delta,
        seqlen_info,
        mask_args_of(problem),
        score_args_of(problem),
        block_lists_of(problem, tiles, launch.block_m, launch.block_n),
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


def seqlen_info_of(problem: Problem, block: int, *, by_keys: bool) -> tuple[SeqlenInfo, int]:
    """Where rows begin and end, and how many tiles of `block` queries (or keys) a row needs.

    Packed documents get a map from tile to document; its size is an upper bound known on the host.
    """
    if problem.cu_q is None or problem.cu_k is None:
        length = problem.num_keys if by_keys else problem.q.shape[2]
        kv_lens = problem.kv_lens
        strides = (0, 0)
        if kv_lens is not None:
            strides = (kv_lens.stride(0), kv_lens.stride(1) if kv_lens.ndim == 2 else 0)
        return SeqlenInfo(problem.q_offsets, kv_lens, *strides), cdiv(length, block)
    cu = problem.cu_k if by_keys else problem.cu_q
    last = (cu[1:] - cu[:-1] + block - 1).div(block, rounding_mode="floor").cumsum(0)
    total = problem.num_keys if by_keys else problem.q.shape[2]
    tiles = cdiv(total, block) + len(cu) - 1
    index = torch.arange(tiles, device=cu.device)
    document = torch.searchsorted(last, index, right=True)
    document = torch.where(document < len(last), document, -1).to(torch.int32)
    first_tile = torch.nn.functional.pad(last, (1, 0)).to(torch.int32)
    return SeqlenInfo(
        cu_q=problem.cu_q, cu_k=problem.cu_k, document=document, first_tile=first_tile
    ), tiles


def mask_args_of(problem: Problem) -> MaskArgs:
    """Everything but causality that decides who sees whom."""
    padding = None if problem.key_padding is None else problem.key_padding.contiguous()
    return MaskArgs(
        problem.window,
        problem.sinks or None,
        padding,
        None if padding is None else padding.stride(0),
        *_grid(problem.attn_mask),
        *_grid(problem.block_mask),
        None if problem.block_mask is None else problem.q_block,
        None if problem.block_mask is None else problem.k_block,
    )


def _grid(x: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """A plane spread out: nested records would lose strides of 1 on the way into a kernel."""
    return (None,) * 4 if x is None else tuple(strided(unit_rows(x)))


def score_args_of(problem: Problem) -> ScoreArgs:
    """What turns a product into a score."""
    slopes = float32(problem.alibi_slopes)
    by_row = slopes is not None and slopes.ndim == 2
    return ScoreArgs(
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


def _use_tma(launch: tuning.Launch, *tensors: Tensor) -> bool:
    """Whether tiles of these tensors are loaded by TMA; the memory it needs is then provided."""
    able = launch.tma and tma_loadable(*tensors)
    if able:
        set_tma_allocator()
    return able
