"""Launcher of the Gluon kernel for few queries over dense or paged keys: how the card is shared."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.decode.kernel import decode_kernel
from saccade.ops.attention.nvidia.problem import Problem, paged_kv_lens, problem_of
from saccade.ops.attention.nvidia.triton.decode_launch import page_table_of, strided_storage
from saccade.ops.attention.nvidia.triton.launch import mask_args_of, seqlen_info_of
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.kernel_args import PageTable
from saccade.ops.gpu.launching import float32, on, strided, unit_rows
from saccade.ops.gpu.support import multiprocessors

ROWS, KEYS = 8, 16  # query rows of a tile, keys of a warp's tile


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """How the kernel is cut.

    Attributes:
        warps: of a program, each with keys of its own.
        per_sm: programs of a multiprocessor.
        stages: tiles in a warp's ring, all but one of them on their way.
    """

    warps: int
    per_sm: int
    stages: int


# By head dimension, measured on an H200 (lab/LOG_gpu_decode.md).
SHORT = {64: DecodeLaunch(4, 1, 12), 128: DecodeLaunch(4, 1, 6)}  # few parts to join
SHARED = {64: DecodeLaunch(4, 2, 6), 128: DecodeLaunch(4, 2, 3)}
ALONE = {64: DecodeLaunch(8, 1, 4), 128: DecodeLaunch(8, 1, 2)}
SHORT_REACH = 4096  # keys that programs share, up to which parts cost more than they gain


def run(call: AttentionCall) -> AttentionOutput:
    """Attention of a call that `decode.refusal` accepts."""
    kv = call.kv
    assert isinstance(kv, (DenseKV, PagedKV))
    pages, kv_lens = PageTable(), call.kv_lens
    if isinstance(kv, PagedKV):
        pages, kv_lens = page_table_of(kv), paged_kv_lens(call)
    problem = problem_of(call, unit_rows(kv.k), unit_rows(kv.v), kv_lens)
    heads, slots = kv.shape[1:3]
    launch = launch_of(problem, heads, slots)
    splits = splits_of(problem, heads, slots, launch)
    parts = SplitKVPartials(problem, splits)
    with on(problem.q.device):
        scan(problem, pages, heads, parts, launch, longest=call.kv_lens is None)
        return parts.combine(problem.q.dtype)


def launch_of(problem: Problem, heads: int, slots: int) -> DecodeLaunch:
    """The configuration for a problem: what matters is how many programs share a row's keys."""
    programs, room = problem.q.shape[0] * heads, multiprocessors(problem.q.device)
    reach, dim = reach_of(problem, slots), problem.q.shape[3]
    ragged = problem.kv_lens is not None and problem.q.shape[0] > 1 and reach > SHORT_REACH
    if room < 2 * programs <= 2 * room and not ragged:
        return ALONE[dim]
    if 2 * programs <= room and (reach <= SHORT_REACH or rows_of(problem, heads) > ROWS):
        return SHORT[dim]
    return SHARED[dim]


def splits_of(problem: Problem, heads: int, slots: int, launch: DecodeLaunch) -> int:
    """How many programs share the keys of a KV head: enough to fill the card, never idle ones."""
    block, reach = KEYS * launch.warps, reach_of(problem, slots)
    tiles = cdiv(reach, block) if problem.window is None else cdiv(min(slots, reach + block), block)
    wanted = launch.per_sm * multiprocessors(problem.q.device)
    return max(1, min(wanted // (problem.q.shape[0] * heads), tiles))


def reach_of(problem: Problem, slots: int) -> int:
    """How many keys the queries of a row see at most."""
    if problem.window is None:
        return slots
    return min(slots, problem.window + problem.q.shape[2] + problem.sinks)


def rows_of(problem: Problem, heads: int) -> int:
    """Rows that share their keys: query heads of a group times queries."""
    return problem.q.shape[1] // heads * problem.q.shape[2]


def scan(
    problem: Problem,
    pages: PageTable,
    heads: int,
    parts: SplitKVPartials,
    launch: DecodeLaunch,
    *,
    longest: bool,
) -> None:
    """Fill all splits of `parts`; `longest`: a row has as many keys as the host says."""
    q, k, v = problem.q, problem.k, problem.v
    seqlen_info, _ = seqlen_info_of(problem, ROWS, by_keys=False)
    decode_kernel[(parts.splits, q.shape[0] * heads)](
        strided(q),
        strided_storage(k, pages),
        strided_storage(v, pages),
        strided(parts.out[0]),
        parts.lse,
        pages,
        seqlen_info,
        mask_args_of(problem),
        float32(problem.sink_logits),
        float(problem.scale),
        q.shape[2],
        problem.num_keys,
        problem.q_offset,
        parts.out.stride(0),
        parts.lse.stride(0),
        KV_HEADS=heads,
        GROUPS=q.shape[1] // heads,
        D=q.shape[3],
        K_STEP=k.stride(2) * 2,
        V_STEP=v.stride(2) * 2,
        PAGE=0 if pages.table is None else k.shape[2],
        LONGEST=longest,
        CAUSAL=problem.causal,
        WARPS=launch.warps,
        STAGES=launch.stages,
        HELD=next_power_of_two(rows_of(problem, heads)),
        launch_pdl=True,
        **options(launch),
    )


def options(launch: DecodeLaunch) -> dict[str, int]:
    """How the kernel is compiled: left alone, ptxas spills to stay within 128 registers."""
    room = 65536 // (32 * launch.warps * launch.per_sm) // 8 * 8
    return {"num_warps": launch.warps, "maxnreg": min(240, room)}
