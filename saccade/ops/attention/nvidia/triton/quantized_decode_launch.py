"""Attention over quantized storage: splits over the quantized keys, more over the recent ones."""

# Triton's own types have neither constexpr arguments of a launch nor its options.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from saccade.core import AttentionOutput, GrowingKV, KeyRange, QuantizedKV, Span
from saccade.core.formats import FP8
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.problem import Problem, problem_of
from saccade.ops.attention.nvidia.triton.decode_launch import (
    decode_into,
    empty_output,
    flat_spans,
    num_splits,
    row_tiling,
)
from saccade.ops.attention.nvidia.triton.launch import (
    compile_options,
    constants,
    mask_args_of,
    score_args_of,
    seqlen_info_of,
)
from saccade.ops.attention.nvidia.triton.quantized_decode import quantized_decode_kernel
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.kernel_args import PageTable
from saccade.ops.gpu.launching import on, quantized_strided, strided, unit_rows
from saccade.ops.gpu.replay import launch_kernel
from saccade.ops.tuning import tables as tuning


class QuantizedReader(NamedTuple):
    """A kernel that attends to quantized keys, and how its launcher splits them.

    Attributes:
        num_splits: of a problem over its quantized keys, 1 or more.
        decode_into: `(problem, kv, partials, splits, *, with_sinks)` computes the first splits.
    """

    num_splits: Callable[[Problem, QuantizedKV], int]
    decode_into: Callable[..., None]


def attend_quantized(call: AttentionCall, reader: QuantizedReader) -> AttentionOutput:
    """Attention of a call over quantized storage, its quantized keys read by `reader`."""
    if isinstance(call.kv, GrowingKV):
        return _attend(call, call.kv.stored, reader, call.kv.num_quantized)
    assert isinstance(call.kv, QuantizedKV)
    return _attend(call, call.kv, reader)


def _attend(
    call: AttentionCall, kv: QuantizedKV, reader: QuantizedReader, packed: Tensor | None = None
) -> AttentionOutput:
    """Splits over the quantized keys, and more over the recent keys of full precision.

    Args:
        packed: the number of quantized keys as a device tensor, where they grow; the recent keys'
            positions then start from it.
    """
    problem = problem_of(call, unit_rows(kv.recent_k), unit_rows(kv.recent_v), call.kv_lens)
    recent = kv.recent_k.shape[2]
    splits = reader.num_splits(problem, kv) if kv.num_quantized else 0
    more = _recent_splits(problem, recent) if recent or not splits else 0
    partials = SplitKVPartials(problem, splits + more)
    if not partials.lse.numel():
        return empty_output(problem)
    spans = flat_spans((Span(0, kv.num_quantized, recent),)) if packed is None else None
    history = problem
    if packed is not None:
        history = replace(problem, kv_lens=packed.expand(problem.q.shape[0]))
    with on(problem.q.device):
        if splits:
            reader.decode_into(history, kv, partials, splits, with_sinks=not more)
        if more:
            decode_into(
                partials, problem, PageTable(), spans, recent, first=splits, splits=more,
                origin=packed,
            )  # fmt: skip
        return partials.combine(problem.q.dtype)


def _recent_splits(problem: Problem, recent: int) -> int:
    heads = problem.k.shape[1]
    return num_splits(problem, heads, recent, row_tiling(problem, heads, tuning.DECODE))


def _quantized_splits(problem: Problem, kv: QuantizedKV) -> int:
    heads = kv.recent_k.shape[1]
    tiling = row_tiling(problem, heads, tuning.DECODE_QUANTIZED)
    return num_splits(problem, heads, kv.num_quantized, tiling)


def _decode_quantized_into(
    problem: Problem, kv: QuantizedKV, partials: SplitKVPartials, splits: int, *, with_sinks: bool
) -> None:
    heads = kv.recent_k.shape[1]
    groups = problem.q.shape[1] // heads
    launch, block_m, row_tiles, _ = row_tiling(problem, heads, tuning.DECODE_QUANTIZED)
    block_n = min(launch.block_n, kv.k_group & -kv.k_group)
    score_args = score_args_of(problem)
    seqlen_info, _ = seqlen_info_of(problem, block_m, by_keys=False)
    launch_kernel(
        quantized_decode_kernel,
        (splits * row_tiles, problem.q.shape[0] * heads),
        strided(problem.q),
        quantized_strided(kv.k, as_bytes=True),
        quantized_strided(kv.v, as_bytes=True),
        strided(partials.out[0]),
        partials.lse,
        seqlen_info,
        mask_args_of(problem),
        score_args if with_sinks else score_args._replace(sink_logits=None),
        block_lists_of(
            problem, row_tiles, block_m, block_n, groups=groups, keys=KeyRange(0, kv.num_quantized)
        ),
        problem.q.shape[2],
        kv.num_quantized,
        problem.q_offset,
        splits,
        partials.out.stride(0),
        partials.lse.stride(0),
        heads,
        groups,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        FAST=problem.q.is_cuda,
        **_format_constants(problem, kv),
        **_half_constants(problem),
        **compile_options(launch),
    )


def _format_constants(problem: Problem, kv: QuantizedKV) -> dict[str, int | bool]:
    return {
        "BITS_K": kv.bits_k,
        "BITS_V": kv.bits_v,
        "FLOAT_K": kv.k.qdata.dtype == FP8,
        "FLOAT_V": kv.v.qdata.dtype == FP8,
        "K_GROUP": kv.k_group,
        "V_GROUP": problem.v.shape[-1] // kv.v.scale.shape[3],
    }


def _half_constants(problem: Problem) -> dict[str, int | bool | str]:
    """The constants of a kernel that processes a head in two halves."""
    found = constants(problem)
    blocks = {name: max(16, int(found[name]) // 2) for name in ("BLOCK_D", "BLOCK_V")}
    return found | blocks


TRITON_READER = QuantizedReader(_quantized_splits, _decode_quantized_into)
