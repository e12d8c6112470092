"""Launcher of the Gluon kernel for quantized keys: how many CTAs share the keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import KeyRange, QuantizedKV
from saccade.core.formats import FP8, QuantizedTensor
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.gluon.quantized_decode.epilogue import BLOCK_M
from saccade.ops.attention.nvidia.gluon.quantized_decode.kernel import quantized_decode_kernel
from saccade.ops.attention.nvidia.gluon.quantized_decode.producer import BLOCK_N
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of, seqlen_info_of
from saccade.ops.attention.nvidia.triton.quantized_decode_launch import QuantizedReader
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.intmath import cdiv
from saccade.ops.gpu.launching import float32, quantized_strided, strided
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.gpu.support import multiprocessors
from saccade.ops.tuning import gluon as tuning


@dataclass(frozen=True, slots=True)
class QuantizedDecodeLaunch:
    """How the kernel is cut.

    Attributes:
        per_sm: CTAs, of one warp each, to aim for per multiprocessor.
        registers: most registers a thread may take.  A quarter of a multiprocessor has registers
            for two warps of 256; two of 192 leave room for a warp of the kernel that combines the
            partials to wait there (PDL).
        min_tiles: fewest tiles of a CTA: combining one more partial costs as much as reading them.
    """

    per_sm: int
    registers: int
    min_tiles: int


LAUNCHES = {
    name: QuantizedDecodeLaunch(**row) for name, row in tuning.rows("quantized_decode").items()
}


def launch_of(problem: Problem) -> QuantizedDecodeLaunch:
    """The launch for a problem's head dimension."""
    return LAUNCHES[str(problem.q.shape[3])]


def format_of(stored: QuantizedTensor, bits: int) -> str:
    """int4, int8 or fp8."""
    return "fp8" if stored.qdata.dtype == FP8 else f"int{bits}"


def row_tiles_of(problem: Problem, heads: int) -> int:
    """Tiles of eight query rows: queries times heads of a group."""
    return cdiv(problem.q.shape[1] // heads * problem.q.shape[2], BLOCK_M.value)


def splits_of(problem: Problem, kv: QuantizedKV) -> int:
    """How many CTAs share the keys of a row tile: enough to fill the GPU, none without keys."""
    launch, heads = launch_of(problem), kv.recent_k.shape[1]
    visible = kv.num_quantized
    if problem.mask.window is not None:
        reach = problem.mask.window + problem.q.shape[2] + problem.mask.sinks
        visible = min(visible, reach + BLOCK_N.value)
    row_tiles = problem.q.shape[0] * heads * row_tiles_of(problem, heads)
    num_ctas = launch.per_sm * multiprocessors(problem.q.device)
    tiles = cdiv(visible, BLOCK_N.value)
    return max(1, min(num_ctas // max(row_tiles, 1), cdiv(tiles, launch.min_tiles)))


def launch_partials(
    problem: Problem, kv: QuantizedKV, parts: SplitKVPartials, splits: int, *, with_sinks: bool
) -> None:
    """Fill the first splits of `parts` from quantized keys."""
    heads = kv.recent_k.shape[1]
    row_tiles = row_tiles_of(problem, heads)
    seqlen_info, _ = seqlen_info_of(problem, BLOCK_M.value, by_keys=False)
    launch_kernel(
        quantized_decode_kernel,
        (splits, row_tiles, problem.q.shape[0] * heads),
        strided(aligned(problem.q)),
        quantized_strided(kv.k, as_bytes=True),
        quantized_strided(kv.v, as_bytes=True),
        strided(parts.out[0]),
        parts.lse,
        seqlen_info,
        mask_args_of(problem if has_partial_tiles(problem) else problem.without_blocks()),
        block_lists_of(
            problem,
            row_tiles,
            BLOCK_M.value,
            BLOCK_N.value,
            groups=problem.q.shape[1] // heads,
            keys=KeyRange(0, kv.num_quantized),
        ),
        float32(problem.call.sink_logits) if with_sinks else None,
        float(problem.call.scale),
        problem.q.shape[2],
        kv.num_quantized,
        problem.q_offset,
        parts.out.stride(0),
        parts.lse.stride(0),
        KV_HEADS=heads,
        GROUPS=problem.q.shape[1] // heads,
        CAUSAL=problem.mask.causal,
        PDL=True,
        **constants(kv),
        **options(launch_of(problem)),
    )


def has_partial_tiles(problem: Problem) -> bool:
    """Whether a tile with a selected block may hold keys that are not selected for all its rows."""
    return bool(problem.k_block % BLOCK_N.value) or problem.q.shape[2] > problem.q_block


def constants(kv: QuantizedKV) -> dict[str, int | str]:
    """Compile-time arguments of the kernel that storage decides."""
    return {
        "D": kv.recent_k.shape[3],
        "K_FORMAT": format_of(kv.k, kv.bits_k),
        "V_FORMAT": format_of(kv.v, kv.bits_v),
        "K_GROUP": kv.k_group,
        "V_GROUPS": kv.v.scale.shape[3],
    }


def options(launch: QuantizedDecodeLaunch) -> dict[str, int | bool]:
    """How the kernel is compiled and launched."""
    return {"num_warps": 1, "maxnreg": launch.registers, "launch_pdl": True}


def aligned(q: Tensor) -> Tensor:
    """Queries whose rows begin at multiples of 16 bytes."""
    steps = (q.stride(i) * q.element_size() for i in (0, 1, 2))
    return q if not q.data_ptr() % 16 and not any(s % 16 for s in steps) else q.contiguous()


READER = QuantizedReader(splits_of, launch_partials)
