"""Launcher of the Gluon decode kernel: how many CTAs share a sequence's keys, and which launch."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.core import AttentionOutput, DenseKV, PagedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.gluon.decode.epilogue import BLOCK_M
from saccade.ops.attention.nvidia.gluon.decode.kernel import WARP_N, decode_kernel
from saccade.ops.attention.nvidia.problem import Problem, paged_kv_lens, problem_of
from saccade.ops.attention.nvidia.triton.decode_launch import page_table_of, strided_storage
from saccade.ops.attention.nvidia.triton.launch import mask_args_of, seqlen_info_of
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.intmath import cdiv, next_power_of_two
from saccade.ops.gpu.kernel_args import PageTable
from saccade.ops.gpu.launching import float32, on, strided, unit_rows
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.support import multiprocessors
from saccade.ops.tuning import gluon as tuning


@dataclass(frozen=True, slots=True)
class DecodeLaunch:
    """How the kernel is cut.

    Attributes:
        warps: of a CTA, each with keys of its own.
        per_sm: CTAs of a multiprocessor.
        stages: tiles in a warp's ring, all but one of them in flight.
        max_keys: visible keys up to which the launch is for short contexts.
    """

    warps: int
    per_sm: int
    stages: int
    max_keys: int = 0


# "HEADDIM/short_context" (combining more partials would cost more than they gain),
# "HEADDIM/split_kv" and "HEADDIM/single_cta" (one CTA reads all keys of a KV head).
LAUNCHES = {name: DecodeLaunch(**row) for name, row in tuning.rows("decode").items()}


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
        launch_partials(problem, pages, heads, parts, launch, k_len_is_max=call.kv_lens is None)
        return parts.combine(problem.q.dtype)


def launch_of(problem: Problem, heads: int, slots: int) -> DecodeLaunch:
    """The launch for a problem; it depends on how many CTAs share a sequence's keys."""
    num_ctas, num_sms = problem.q.shape[0] * heads, multiprocessors(problem.q.device)
    dim, visible = problem.q.shape[3], max_visible_keys(problem, slots)
    short = LAUNCHES[f"{dim}/short_context"]
    is_long = visible > short.max_keys
    ragged = problem.kv_lens is not None and problem.q.shape[0] > 1 and is_long
    if num_sms < 2 * num_ctas <= 2 * num_sms and not ragged:
        return LAUNCHES[f"{dim}/single_cta"]
    if 2 * num_ctas <= num_sms and (not is_long or problem.call.group_rows > BLOCK_M.value):
        return short
    return LAUNCHES[f"{dim}/split_kv"]


def splits_of(problem: Problem, heads: int, slots: int, launch: DecodeLaunch) -> int:
    """How many CTAs share the keys of a KV head: enough to fill the GPU, none without keys."""
    block_n, visible = WARP_N.value * launch.warps, max_visible_keys(problem, slots)
    if problem.mask.window is not None:
        visible = min(slots, visible + block_n)  # a window may begin inside a tile
    num_ctas = launch.per_sm * multiprocessors(problem.q.device)
    return max(1, min(num_ctas // (problem.q.shape[0] * heads), cdiv(visible, block_n)))


def max_visible_keys(problem: Problem, slots: int) -> int:
    """How many keys the queries of a sequence attend to at most."""
    if problem.mask.window is None:
        return slots
    return min(slots, problem.mask.window + problem.q.shape[2] + problem.mask.sinks)


def launch_partials(
    problem: Problem,
    pages: PageTable,
    heads: int,
    parts: SplitKVPartials,
    launch: DecodeLaunch,
    *,
    k_len_is_max: bool,
) -> None:
    """Fill all splits of `parts`; `k_len_is_max`: the longest sequence has `num_keys` keys."""
    q, k, v = problem.q, problem.k, problem.v
    seqlen_info, _ = seqlen_info_of(problem, BLOCK_M.value, by_keys=False)
    launch_kernel(
        decode_kernel,
        (parts.splits, q.shape[0] * heads),
        strided(q),
        strided_storage(k, pages),
        strided_storage(v, pages),
        strided(parts.out[0]),
        parts.lse,
        pages,
        seqlen_info,
        mask_args_of(problem),
        float32(problem.call.sink_logits),
        float(problem.call.scale),
        q.shape[2],
        problem.num_keys,
        problem.q_offset,
        parts.out.stride(0),
        parts.lse.stride(0),
        KV_HEADS=heads,
        GROUPS=q.shape[1] // heads,
        D=q.shape[3],
        K_STRIDE=k.stride(2) * 2,
        V_STRIDE=v.stride(2) * 2,
        PAGE_SIZE=0 if pages.table is None else k.shape[2],
        K_LEN_IS_MAX=k_len_is_max,
        CAUSAL=problem.mask.causal,
        WARPS=launch.warps,
        STAGES=launch.stages,
        ROWS=next_power_of_two(problem.call.group_rows),
        launch_pdl=True,
        **options(launch),
    )


def options(launch: DecodeLaunch) -> dict[str, int]:
    """How the kernel is compiled: left alone, ptxas spills to stay within 128 registers."""
    registers = 65536 // (32 * launch.warps * launch.per_sm) // 8 * 8
    return {"num_warps": launch.warps, "maxnreg": min(240, registers)}
