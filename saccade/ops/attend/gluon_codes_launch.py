"""Launcher of the Gluon kernel for codes: how many splits, how many keys a step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import QuantizedKV
from saccade.core.formats import FP8, Codes
from saccade.ops import tuning
from saccade.ops.attend.gluon_codes_kernel import codes_kernel
from saccade.ops.attend.triton_launch import bounds_of, plane
from saccade.ops.attend.triton_problem import Problem
from saccade.ops.attend.triton_views import Parts, Reader, coded
from saccade.ops.whole import cdiv

ROWS = 8


@dataclass(frozen=True, slots=True)
class CodesLaunch:
    """How the kernel is cut.

    Attributes:
        tiles: tiles of 16 keys that a warp takes in a step.
        warps: warps of a program, each with keys of its own.
        per_sm: programs of a multiprocessor.
        registers: most registers a thread may take, 0 for what the compiler likes.
        ahead: the cache into which the next step's scales are brought, or None.
    """

    tiles: int
    warps: int
    per_sm: int
    registers: int = 0
    ahead: str | None = "L2"

    @property
    def keys(self) -> int:
        """Keys of a step of all warps."""
        return 16 * self.tiles * self.warps


LAUNCHES: dict[str, CodesLaunch] = {  # by the wider of the two kinds
    "int4": CodesLaunch(4, 4, 2),
    "int8": CodesLaunch(2, 4, 2),
    "fp8": CodesLaunch(2, 4, 2),
}


def kind_of(codes: Codes, bits: int) -> str:
    """int4, int8 or fp8."""
    return "fp8" if codes.codes.dtype == FP8 else f"int{bits}"


def launch_of(kv: QuantizedKV) -> CodesLaunch:
    """The configuration for a view."""
    both = LAUNCHES[kind_of(kv.k, kv.bits_k)], LAUNCHES[kind_of(kv.v, kv.bits_v)]
    return min(both, key=lambda launch: launch.tiles)


def row_tiles_of(problem: Problem, heads: int) -> int:
    """Tiles of eight rows: queries times heads of a group."""
    return cdiv(problem.q.shape[1] // heads * problem.q.shape[2], ROWS)


def splits_of(problem: Problem, kv: QuantizedKV) -> int:
    """How many programs share the keys of a row tile: enough to fill the card, never idle ones."""
    launch, heads = launch_of(kv), kv.recent_k.shape[1]
    reach = kv.num_packed
    if problem.window is not None:
        reach = min(reach, problem.window + problem.q.shape[2] + launch.keys)
    programs = problem.q.shape[0] * heads * row_tiles_of(problem, heads)
    room = launch.per_sm * tuning.multiprocessors(problem.q.device)
    return max(1, min(room // max(programs, 1), cdiv(reach, launch.keys)))


def scan_codes(
    problem: Problem, kv: QuantizedKV, parts: Parts, splits: int, *, with_sinks: bool
) -> None:
    """Fill the first splits of `parts` from codes."""
    assert not (with_sinks and problem.sink_logits is not None)
    launch, heads = launch_of(kv), kv.recent_k.shape[1]
    row_tiles = row_tiles_of(problem, heads)
    bounds, _ = bounds_of(problem, ROWS, by_keys=False)
    codes_kernel[(splits, row_tiles, problem.q.shape[0] * heads)](
        plane(aligned(problem.q)),
        *coded(kv.k),
        *coded(kv.v),
        plane(parts.out[0]),
        parts.lse,
        bounds,
        problem.window,
        float(problem.scale),
        problem.q.shape[2],
        kv.num_packed,
        problem.q_offset,
        parts.out.stride(0),
        parts.lse.stride(0),
        KV_HEADS=heads,
        GROUPS=problem.q.shape[1] // heads,
        CAUSAL=problem.causal,
        EARLY=True,
        launch_pdl=True,
        num_warps=launch.warps,
        **constants(kv, launch),
        **({"maxnreg": launch.registers} if launch.registers else {}),
    )


def constants(kv: QuantizedKV, launch: CodesLaunch) -> dict[str, int | str | None]:
    """Compile-time arguments of the kernel that storage and launch decide."""
    return {
        "D": kv.recent_k.shape[3],
        "KIND_K": kind_of(kv.k, kv.bits_k),
        "KIND_V": kind_of(kv.v, kv.bits_v),
        "K_GROUP": kv.k_group,
        "V_GROUPS": kv.v.scale.shape[3],
        "TILES": launch.tiles,
        "WARPS": launch.warps,
        "AHEAD": launch.ahead,
    }


def aligned(q: Tensor) -> Tensor:
    """Queries whose rows begin at multiples of 16 bytes."""
    steps = (q.stride(i) * q.element_size() for i in (0, 1, 2))
    return q if not q.data_ptr() % 16 and not any(s % 16 for s in steps) else q.contiguous()


READER = Reader(splits_of, scan_codes)
