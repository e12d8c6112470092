"""Launcher of the Gluon kernel for codes: how many programs share the keys."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import QuantizedKV
from saccade.core.formats import FP8, QuantizedTensor
from saccade.ops.attention.nvidia.gluon.quantized_decode.kernel import codes_kernel
from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.attention.nvidia.triton.launch import mask_args_of, seqlen_info_of
from saccade.ops.attention.nvidia.triton.quantized_decode_launch import QuantizedReader
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.intmath import cdiv
from saccade.ops.gpu.launching import float32, quantized_strided, strided
from saccade.ops.gpu.support import multiprocessors

TILE = 64  # keys of a warp's tile, which lie in one group of tokens
ROWS = 8  # query rows (heads of a group times queries) of a program
FEWEST = 2  # tiles of a program: to join one more costs as much as to read one more


@dataclass(frozen=True, slots=True)
class CodesLaunch:
    """How the kernel is cut.

    Attributes:
        per_sm: programs, of one warp each, to aim for per multiprocessor.
        registers: most registers a thread may take.
    """

    per_sm: int
    registers: int


# Measured on an H200 (lab/LOG_gpu_codes.md).  A quarter of a multiprocessor has registers for two
# warps of 256; two of 192 leave room for a warp of the kernel that joins the parts to wait there.
LAUNCH = CodesLaunch(8, 192)


def kind_of(qdata: QuantizedTensor, bits: int) -> str:
    """int4, int8 or fp8."""
    return "fp8" if qdata.qdata.dtype == FP8 else f"int{bits}"


def row_tiles_of(problem: Problem, heads: int) -> int:
    """Tiles of eight rows: queries times heads of a group."""
    return cdiv(problem.q.shape[1] // heads * problem.q.shape[2], ROWS)


def splits_of(problem: Problem, kv: QuantizedKV) -> int:
    """How many programs share the keys of a row tile: enough to fill the card, never idle ones."""
    heads = kv.recent_k.shape[1]
    reach = kv.num_packed
    if problem.window is not None:
        reach = min(reach, problem.window + problem.q.shape[2] + problem.sinks + TILE)
    programs = problem.q.shape[0] * heads * row_tiles_of(problem, heads)
    room = LAUNCH.per_sm * multiprocessors(problem.q.device) // max(programs, 1)
    return max(1, min(room, cdiv(cdiv(reach, TILE), FEWEST)))


def scan_codes(
    problem: Problem, kv: QuantizedKV, parts: SplitKVPartials, splits: int, *, with_sinks: bool
) -> None:
    """Fill the first splits of `parts` from codes."""
    heads = kv.recent_k.shape[1]
    row_tiles = row_tiles_of(problem, heads)
    seqlen_info, _ = seqlen_info_of(problem, ROWS, by_keys=False)
    codes_kernel[(splits, row_tiles, problem.q.shape[0] * heads)](
        strided(aligned(problem.q)),
        quantized_strided(kv.k, as_bytes=True),
        quantized_strided(kv.v, as_bytes=True),
        strided(parts.out[0]),
        parts.lse,
        seqlen_info,
        mask_args_of(problem),
        float32(problem.sink_logits) if with_sinks else None,
        float(problem.scale),
        problem.q.shape[2],
        kv.num_packed,
        problem.q_offset,
        parts.out.stride(0),
        parts.lse.stride(0),
        KV_HEADS=heads,
        GROUPS=problem.q.shape[1] // heads,
        CAUSAL=problem.causal,
        PDL=True,
        **constants(kv),
        **options(LAUNCH),
    )


def constants(kv: QuantizedKV) -> dict[str, int | str]:
    """Compile-time arguments of the kernel that storage decides."""
    return {
        "D": kv.recent_k.shape[3],
        "K_FORMAT": kind_of(kv.k, kv.bits_k),
        "V_FORMAT": kind_of(kv.v, kv.bits_v),
        "K_GROUP": kv.k_group,
        "V_GROUPS": kv.v.scale.shape[3],
    }


def options(launch: CodesLaunch) -> dict[str, int | bool]:
    """How the kernel is compiled and launched."""
    return {"num_warps": 1, "maxnreg": launch.registers, "launch_pdl": True}


def aligned(q: Tensor) -> Tensor:
    """Queries whose rows begin at multiples of 16 bytes."""
    steps = (q.stride(i) * q.element_size() for i in (0, 1, 2))
    return q if not q.data_ptr() % 16 and not any(s % 16 for s in steps) else q.contiguous()


READER = QuantizedReader(splits_of, scan_codes)
