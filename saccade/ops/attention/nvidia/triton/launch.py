"""Launchers of the Triton kernels for plain dense keys: forward and backward of one Problem."""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import AttentionOutput
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.backward import (
    backward_kv_kernel,
    backward_q_kernel,
    delta_kernel,
)
from saccade.ops.attention.nvidia.triton.forward import forward_kernel
from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.kernel_args import MaskArgs, ScoreArgs, SeqlenInfo, StridedTensor
from saccade.ops.gpu.launching import (
    float32,
    on,
    set_tma_allocator,
    strided,
    tma_loadable,
    unit_rows,
)
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.tuning import tables as tuning

DELTA_ROWS = 32  # of a program of delta_kernel


def forward(problem: Problem, out: Tensor | None = None) -> AttentionOutput:
    """Output and lse of a problem over plain dense keys, the output in `out` where it is given."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, q_len, _ = q.shape
    if out is None:
        out = torch.empty(batch, heads, q_len, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return AttentionOutput(out, lse)
    launch = _pick(problem, _forward_table(problem))
    seqlen_info, tiles = seqlen_info_of(problem, launch.block_m, by_keys=False)
    with on(q.device):
        launch_kernel(
            forward_kernel,
            (batch * heads, tiles),
            strided(q),
            strided(k),
            strided(v),
            strided(out),
            lse,
            seqlen_info,
            mask_args_of(problem),
            score_args_of(problem),
            block_lists_of(problem, tiles, launch.block_m, launch.block_n),
            *_lengths(problem),
            TMA=_use_tma(launch, k, v),
            **_constants(problem, launch),
        )
    return AttentionOutput(out, lse)


def backward(
    problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv, delta), delta being rowsum(dout * out) - dlse `[B, H, Lq]`."""
    q, k, v = problem.q, problem.k, problem.v
    dq, dk, dv = _gradient_of(q), _gradient_of(k), _gradient_of(v)
    delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
    if lse.numel() == 0 or problem.num_keys == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_()
    dout, dlse = unit_rows(dout), dlse.contiguous()
    batch, heads, q_len, _ = q.shape
    sizes = constants(problem)
    with on(q.device):
        launch_kernel(
            delta_kernel,
            (batch * heads, cdiv(q_len, DELTA_ROWS)),
            strided(out),
            strided(dout),
            lse,
            dlse,
            delta,
            lse2,
            q_len,
            heads,
            VALUE_DIM=sizes["VALUE_DIM"],
            BLOCK_V=sizes["BLOCK_V"],
            BLOCK_M=DELTA_ROWS,
        )
        inputs = (strided(q), strided(k), strided(v), strided(dout))
        _backward_kv(problem, inputs, dk, dv, lse2, delta)
        _backward_q(problem, inputs, dq, lse2, delta)
    return dq, dk, dv, delta


def _backward_kv(
    problem: Problem,
    inputs: tuple[StridedTensor, ...],
    dk: Tensor,
    dv: Tensor,
    lse2: Tensor,
    delta: Tensor,
) -> None:
    launch = _pick(problem, tuning.BACKWARD_KV)
    seqlen_info, tiles = seqlen_info_of(problem, launch.block_n, by_keys=True)
    q_tiles = cdiv(problem.q.shape[2], launch.block_m)
    launch_kernel(
        backward_kv_kernel,
        (dk.shape[0] * dk.shape[1], tiles),
        *inputs,
        strided(dk),
        strided(dv),
        lse2,
        delta,
        seqlen_info,
        mask_args_of(problem),
        score_args_of(problem),
        block_lists_of(problem, q_tiles, launch.block_m, launch.block_n, by_keys=True),
        *_lengths(problem),
        TMA=_use_tma(launch, inputs[0].ptr, inputs[3].ptr),
        **_constants(problem, launch),
    )


def _backward_q(
    problem: Problem, inputs: tuple[StridedTensor, ...], dq: Tensor, lse2: Tensor, delta: Tensor
) -> None:
    launch = _pick(problem, tuning.BACKWARD_Q)
    seqlen_info, tiles = seqlen_info_of(problem, launch.block_m, by_keys=False)
    launch_kernel(
        backward_q_kernel,
        (dq.shape[0] * dq.shape[1], tiles),
        *inputs,
        strided(dq),
        lse2,
        delta,
        seqlen_info,
        mask_args_of(problem),
        score_args_of(problem),
        block_lists_of(problem, tiles, launch.block_m, launch.block_n),
        *_lengths(problem),
        **_constants(problem, launch),
    )


def seqlen_info_of(problem: Problem, block: int, *, by_keys: bool) -> tuple[SeqlenInfo, int]:
    """Sequence lengths and offsets, and how many tiles of `block` queries (or keys) there are.

    Packed sequences get a map from tile to sequence; the number of tiles is then an upper bound,
    because cu_seqlens are on the device.
    """
    total = problem.num_keys if by_keys else problem.q.shape[2]
    if problem.cu_q is None or problem.cu_k is None:
        kv_lens = problem.kv_lens
        strides = (0, 0)
        if kv_lens is not None:
            strides = (kv_lens.stride(0), kv_lens.stride(1) if kv_lens.ndim == 2 else 0)
        return SeqlenInfo(problem.q_offsets, kv_lens, *strides), cdiv(total, block)
    cu = problem.cu_k if by_keys else problem.cu_q
    last = (cu[1:] - cu[:-1] + block - 1).div(block, rounding_mode="floor").cumsum(0)
    tiles = cdiv(total, block) + len(cu) - 1
    index = torch.arange(tiles, device=cu.device)
    sequence = torch.searchsorted(last, index, right=True)
    sequence = torch.where(sequence < len(last), sequence, -1).to(torch.int32)
    first_tile = torch.nn.functional.pad(last, (1, 0)).to(torch.int32)
    return SeqlenInfo(
        cu_q=problem.cu_q, cu_k=problem.cu_k, sequence=sequence, first_tile=first_tile
    ), tiles


def mask_args_of(problem: Problem) -> MaskArgs:
    """The mask of a problem beyond causality."""
    padding = None if problem.call.key_padding is None else problem.call.key_padding.contiguous()
    return MaskArgs(
        problem.mask.window,
        problem.mask.sinks or None,
        padding,
        None if padding is None else padding.stride(0),
        *_flat_strided(problem.call.attn_mask),
        *_flat_strided(problem.block_mask),
        None if problem.block_mask is None else problem.q_block,
        None if problem.block_mask is None else problem.k_block,
    )


def _flat_strided(x: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """Pointer and strides as fields of the outer tuple: nested ones would lose strides of 1."""
    return (None,) * 4 if x is None else tuple(strided(unit_rows(x)))


def score_args_of(problem: Problem) -> ScoreArgs:
    """How the scores of a problem are made from the products q.k."""
    slopes = float32(problem.call.alibi_slopes)
    per_row = slopes is not None and slopes.ndim == 2 and slopes.shape[0] > 1
    return ScoreArgs(
        scale=float(problem.call.scale),
        softcap=problem.call.softcap,
        alibi_slopes=slopes,
        alibi_slopes_batch=None if slopes is None else (slopes.stride(0) if per_row else 0),
        sink_logits=float32(problem.call.sink_logits),
    )


def constants(problem: Problem) -> dict[str, int | bool | str]:
    """Compile-time constants of a problem that all kernels share."""
    dim, value_dim = problem.q.shape[-1], problem.v.shape[-1]
    return {
        "HEAD_DIM": dim,
        "VALUE_DIM": value_dim,
        "BLOCK_D": max(16, next_power_of_two(dim)),
        "BLOCK_V": max(16, next_power_of_two(value_dim)),
        "CAUSAL": problem.mask.causal,
        "RAW": problem.raw,
        "PRECISION": "ieee" if problem.q.dtype == torch.float32 else "tf32",
    }


def compile_options(launch: tuning.Launch) -> dict[str, int]:
    """Pipeline depth, warps and registers of a launch."""
    found = {"STAGES": launch.stages, "num_warps": launch.warps, "num_stages": launch.stages}
    return found | ({"maxnreg": launch.registers} if launch.registers else {})


def _constants(problem: Problem, launch: tuning.Launch) -> dict[str, int | bool | str]:
    tile = {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n}
    return tile | constants(problem) | compile_options(launch)


def _forward_table(problem: Problem) -> tuning.Kernel:
    if problem.block_mask is not None:
        return tuning.FORWARD_BLOCK_SPARSE
    return tuning.FORWARD if problem.mask.window is None else tuning.FORWARD_WINDOW


def _pick(problem: Problem, table: tuning.Kernel) -> tuning.Launch:
    return tuning.pick(table, problem.q, max(problem.q.shape[-1], problem.v.shape[-1]))


def _lengths(problem: Problem) -> tuple[int, int, int, int, int]:
    """(q_len, k_len, q_offset, heads, groups), as the kernels take them."""
    heads, q_len = problem.q.shape[1:3]
    return q_len, problem.num_keys, problem.q_offset, heads, heads // problem.k.shape[1]


def _gradient_of(x: Tensor) -> Tensor:
    """Contiguous space for the gradient of `x`, which may be an expanded tensor."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _use_tma(launch: tuning.Launch, *tensors: Tensor) -> bool:
    """Whether tiles of these tensors are loaded by TMA; its allocator is then registered."""
    use = launch.tma and tma_loadable(*tensors)
    if use:
        set_tma_allocator()
    return use
