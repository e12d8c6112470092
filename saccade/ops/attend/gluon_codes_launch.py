"""Launcher of the Gluon kernel over codes, and which views it covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.core import QuantizedKV
from saccade.core.formats import FP8
from saccade.ops import tuning
from saccade.ops.attend.triton_launch import bounds_of, plane, rules_of
from saccade.ops.attend.triton_problem import Problem, float32
from saccade.ops.attend.triton_quantized import Coded
from saccade.ops.whole import cdiv

if TYPE_CHECKING:
    from saccade.ops.attend.triton_views import Parts

TILE = 64  # keys of a warp's tile, which lie in one group of tokens
ROWS = 8  # query rows (heads of a group times queries) of a program
ALIGNED = 16  # bytes of a load


@dataclass(frozen=True, slots=True)
class CodesLaunch:
    """Programs (of one warp) to aim for per multiprocessor, and registers a thread may take."""

    per_sm: int
    registers: int


LAUNCH = CodesLaunch(8, 240)


def covers(problem: Problem, kv: QuantizedKV) -> bool:
    """Whether the kernel knows the card, the format, the layout and the rules of a call."""
    q, dim = problem.q, problem.q.shape[3]
    if tuning.architecture(q.device) != "sm_90" or q.dtype not in (torch.bfloat16, torch.float16):
        return False
    foreign = (problem.padding, problem.allowed, problem.foreign, problem.cu_q)
    if not problem.raw or any(x is not None for x in foreign):
        return False
    groups = kv.v.scale.shape[3]
    if dim not in (64, 128) or problem.v.shape[3] != dim or groups > 2 or kv.k_group % TILE:
        return False
    return _aligned(q) and all(_aligned(x) and _dense(x) for x in (*kv.k, *kv.v))


def _aligned(x: Tensor) -> bool:
    """Whether every row that a thread starts from lies at a multiple of 16 bytes."""
    size = x.element_size()
    steps = [x.data_ptr()] + [x.stride(i) * size for i in (0, 1) if x.shape[i] > 1]
    return x.stride(3) == 1 and all(step % ALIGNED == 0 for step in steps)


def _dense(x: Tensor) -> bool:
    """Whether rows follow each other without a gap."""
    return x.shape[2] == 1 or x.stride(2) == x.shape[3]


def row_tiles_of(problem: Problem, heads: int) -> int:
    """Programs that share a split's keys, eight query rows each."""
    return cdiv(problem.q.shape[1] // heads * problem.q.shape[2], ROWS)


def code_splits(problem: Problem, kv: QuantizedKV, launch: CodesLaunch | None = None) -> int:
    """How many programs share the codes of a row tile: enough to fill the card, none idle."""
    launch = launch or LAUNCH
    heads = kv.recent_k.shape[1]
    reach = kv.num_packed
    if problem.window is not None:
        reach = min(reach, problem.window + problem.q.shape[2] + problem.sinks + TILE)
    programs = problem.q.shape[0] * heads * row_tiles_of(problem, heads)
    wanted = launch.per_sm * tuning.multiprocessors(problem.q.device)
    return max(1, min(wanted // programs, cdiv(reach, TILE)))


def format_of(codes: Tensor, bits: int) -> str:
    """Name of a format as the kernel knows it."""
    return "fp8" if codes.dtype == FP8 else f"int{bits}"


def scan_codes(
    problem: Problem,
    kv: QuantizedKV,
    parts: Parts,
    splits: int,
    *,
    with_sinks: bool,
    launch: CodesLaunch | None = None,
) -> None:
    """Fill the first splits of `parts` from the codes."""
    from saccade.ops.attend.gluon_codes import codes_kernel

    launch = launch or LAUNCH
    q, heads = problem.q, kv.recent_k.shape[1]
    bounds, _ = bounds_of(problem, ROWS, by_keys=False)
    codes_kernel[(splits * row_tiles_of(problem, heads), q.shape[0] * heads)](
        plane(q),
        Coded(*(plane(part) for part in kv.k)),
        Coded(*(plane(part) for part in kv.v)),
        plane(parts.out[0]),
        parts.lse,
        bounds,
        rules_of(problem),
        float32(problem.sink_logits) if with_sinks else None,
        float(problem.scale),
        q.shape[2],
        kv.num_packed,
        problem.q_offset,
        splits,
        parts.out.stride(0),
        parts.lse.stride(0),
        heads,
        q.shape[1] // heads,
        D=q.shape[3],
        K_FORMAT=format_of(kv.k.codes, kv.bits_k),
        V_FORMAT=format_of(kv.v.codes, kv.bits_v),
        K_GROUP=kv.k_group,
        V_GROUPS=kv.v.scale.shape[3],
        CAUSAL=problem.causal,
        num_warps=1,
        maxnreg=launch.registers,
        launch_pdl=True,
    )
