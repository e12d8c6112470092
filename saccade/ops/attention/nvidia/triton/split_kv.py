"""Launchers of the Triton kernels that read a cache: any view, few queries or many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import AttentionOutput, DenseKV, GrowingKV, PagedKV, QuantizedKV, RaggedKV, Span
from saccade.core.formats import FP8, QuantizedTensor
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.block_lists import block_lists_of
from saccade.ops.attention.nvidia.problem import Problem, paged_kv_lens, problem_of
from saccade.ops.attention.nvidia.triton.decode import Pages, decode_kernel, merge_kernel
from saccade.ops.attention.nvidia.triton.launch import (
    constants,
    mask_args_of,
    schedule,
    score_args_of,
    seqlen_info_of,
)
from saccade.ops.attention.nvidia.triton.quantized_decode import Coded, quantized_kernel
from saccade.ops.gpu.intmath import cdiv, power_of_two
from saccade.ops.gpu.kernel_args import StridedTensor
from saccade.ops.gpu.launching import on, pdl_options, strided, unit_rows
from saccade.ops.gpu.support import multiprocessors
from saccade.ops.tuning import tables as tuning


class Parts:
    """Output and lse of every split: the final tensors where there is one split alone."""

    def __init__(self, problem: Problem, splits: int) -> None:
        q = problem.q
        self.shape = (*q.shape[:3], problem.v.shape[-1])
        dtype = q.dtype if splits == 1 else torch.float32
        self.splits = splits
        self.out = torch.empty((splits, *self.shape), dtype=dtype, device=q.device)
        self.lse = torch.empty((splits, *self.shape[:3]), dtype=torch.float32, device=q.device)

    def joined(self, dtype: torch.dtype) -> AttentionOutput:
        """The attention over all splits."""
        if self.splits == 1:
            return AttentionOutput(self.out[0], self.lse[0])
        out = torch.empty(self.shape, dtype=dtype, device=self.out.device)
        lse = torch.empty(self.shape[:3], dtype=torch.float32, device=self.out.device)
        value_dim = self.shape[3]
        block_v, block_s, warps = merge_blocks(self.splits, value_dim)
        merge_kernel[(lse.numel(), cdiv(value_dim, block_v))](
            self.out,
            self.lse,
            out,
            lse,
            self.splits,
            self.out.stride(0),
            self.lse.stride(0),
            VALUE_DIM=value_dim,
            BLOCK_V=block_v,
            BLOCK_S=block_s,
            ONCE=self.splits <= block_s,
            num_warps=warps,
            **pdl_options(self.out.device),
        )
        return AttentionOutput(out, lse)


def merge_blocks(splits: int, value_dim: int) -> tuple[int, int, int]:
    """(channels, splits, warps) of a program that joins parts.

    One warp needs no barrier and has all of its parts on their way at once, in at most 128
    registers of a thread; beyond 64 parts four share them (measured on an H200,
    lab/LOG_gpu_decode.md and lab/LOG_gpu_codes.md).
    """
    most = 128 if splits <= 16 else 64 if splits <= 32 else 32
    block_v, warps = min(most, power_of_two(value_dim)), 4 if splits > 64 else 1
    room = 8192 if warps == 4 else 4096
    return block_v, max(1, min(power_of_two(splits), room // block_v)), warps


def run_view(call: AttentionCall) -> AttentionOutput:
    """Attention of a call over any view."""
    kv = call.kv
    if isinstance(kv, (QuantizedKV, GrowingKV)):
        return run_codes(call, Reader(_code_splits, _scan_codes))
    if isinstance(kv, DenseKV):
        problem = problem_of(call, unit_rows(kv.k), unit_rows(kv.v), call.kv_lens)
        spans = None if kv.is_plain else flat(kv.spans)
        return _whole(problem, Pages(), spans, kv.k.shape[2])
    assert isinstance(kv, (PagedKV, RaggedKV))
    kv_lens = paged_kv_lens(call) if isinstance(kv, PagedKV) else kv.kv_lens
    problem = problem_of(call, unit_rows(kv.k), unit_rows(kv.v), kv_lens)
    if isinstance(kv, PagedKV):
        return _whole(problem, pages_of(kv), None, kv.end)
    strides = (
        kv.page_table.stride(0),
        kv.page_table.stride(1),
        problem.k.stride(0),
        problem.v.stride(0),
    )
    return _whole(problem, Pages(kv.page_table, *strides, kv.positions), None, kv.max_length)


def pages_of(kv: PagedKV) -> Pages:
    """How slots of a row are found in the pages that all KV heads share."""
    return Pages(kv.page_table, kv.page_table.stride(0), 0, kv.k.stride(0), kv.v.stride(0))


def flat(spans: tuple[Span, ...]) -> tuple[int, ...]:
    """(slot, position, length) of four spans in a row, so that one kernel serves every ring."""
    padded = (*spans, *(Span(0, 0, 0),) * (4 - len(spans)))
    return tuple(number for span in padded for number in span)


def _whole(
    problem: Problem, pages: Pages, spans: tuple[int, ...] | None, slots: int
) -> AttentionOutput:
    heads = kv_heads(problem, pages)
    launch, _, row_tiles = rows_of(problem, heads, table_of(pages))
    parts = Parts(problem, splits_of(problem, heads, slots, row_tiles, launch))
    if parts.lse.numel():
        with on(problem.q.device):
            scan(problem, pages, spans, slots, parts, 0, parts.splits)
            return parts.joined(problem.q.dtype)
    return parts.joined(problem.q.dtype) if parts.splits == 1 else _nothing(problem)


def _nothing(problem: Problem) -> AttentionOutput:
    return Parts(problem, 1).joined(problem.q.dtype)


def kv_heads(problem: Problem, pages: Pages) -> int:
    """KV heads of the storage; ragged pages belong to one head and the table says how many."""
    return problem.k.shape[1] if pages.positions is None else pages.table.shape[1]


def table_of(pages: Pages) -> tuning.Kernel:
    """Which table of configurations serves keys stored like that."""
    return tuning.DECODE if pages.table is None else tuning.DECODE_PAGES


def rows_of(problem: Problem, heads: int, table: tuning.Kernel) -> tuple[tuning.Launch, int, int]:
    """(configuration, rows of a tile, tiles of rows): rows are queries times heads of a group."""
    launch = tuning.pick(table, problem.q, max(problem.q.shape[-1], problem.v.shape[-1]))
    rows = problem.q.shape[1] // heads * problem.q.shape[2]
    block_m = min(max(16, power_of_two(rows)), launch.block_m)
    return launch, block_m, cdiv(rows, block_m)


def splits_of(
    problem: Problem, heads: int, slots: int, row_tiles: int, launch: tuning.Launch
) -> int:
    """How many programs share the keys of a row tile: enough to fill the card, never idle ones."""
    reach = slots
    if problem.window is not None:
        reach = min(slots, problem.window + problem.q.shape[2] + problem.sinks + launch.block_n)
    programs = problem.q.shape[0] * heads * row_tiles
    wanted = launch.per_sm * multiprocessors(problem.q.device)
    return max(1, min(wanted // max(programs, 1), cdiv(reach, launch.block_n)))


def scan(
    problem: Problem,
    pages: Pages,
    spans: tuple[int, ...] | None,
    slots: int,
    parts: Parts,
    at: int,
    splits: int,
    origin: Tensor | None = None,
) -> None:
    """Fill the splits at .. at + splits - 1 of `parts` from stored keys of full precision."""
    heads = kv_heads(problem, pages)
    launch, block_m, row_tiles = rows_of(problem, heads, table_of(pages))
    k, v = stored(problem.k, pages), stored(problem.v, pages)
    groups = problem.q.shape[1] // heads
    seqlen_info = seqlen_info_of(problem, block_m, by_keys=False)[0]._replace(origin=origin)
    decode_kernel[(splits * row_tiles, problem.q.shape[0] * heads)](
        strided(problem.q),
        k,
        v,
        strided(parts.out[at]),
        parts.lse[at],
        pages,
        spans,
        seqlen_info,
        mask_args_of(problem),
        score_args_of(problem),
        block_lists_of(problem, row_tiles, block_m, launch.block_n, groups=groups),
        problem.q.shape[2],
        slots if pages.positions is not None else problem.num_keys,
        slots,
        problem.q_offset,
        splits,
        parts.out.stride(0),
        parts.lse.stride(0),
        heads,
        groups,
        BLOCK_M=block_m,
        BLOCK_N=launch.block_n,
        PAGE=1 if pages.table is None else page_size(problem.k, pages),
        **constants(problem),
        **pdl_options(problem.q.device),
        **schedule(launch),
    )


def stored(x: Tensor, pages: Pages) -> StridedTensor:
    """Strides of storage: pages have no batch, and ragged ones no heads."""
    if pages.table is None:
        return strided(x)
    if pages.positions is None:
        return StridedTensor(x, 0, x.stride(1), x.stride(2))
    return StridedTensor(x, 0, 0, x.stride(1))


def page_size(x: Tensor, pages: Pages) -> int:
    """Slots of a page."""
    return x.shape[2] if pages.positions is None else x.shape[1]


class Reader(NamedTuple):
    """Who reads codes: how many splits it wants, 1 or more, and the launch that fills them."""

    splits: Callable[[Problem, QuantizedKV], int]
    scan: Callable[..., None]


def run_codes(call: AttentionCall, reader: Reader) -> AttentionOutput:
    """Attention of a call over quantised storage, its codes read by `reader`."""
    if isinstance(call.kv, GrowingKV):
        return _quantized(call, call.kv.stored, reader, call.kv.num_quantized)
    assert isinstance(call.kv, QuantizedKV)
    return _quantized(call, call.kv, reader)


def _quantized(
    call: AttentionCall, kv: QuantizedKV, reader: Reader, packed: Tensor | None = None
) -> AttentionOutput:
    """Splits over the codes, and more for the recent keys of full precision.

    Args:
        packed: how many codes there are, where only the device knows; recent keys then count
            their positions from there.
    """
    problem = problem_of(call, unit_rows(kv.recent_k), unit_rows(kv.recent_v), call.kv_lens)
    heads, recent = kv.recent_k.shape[1], kv.recent_k.shape[2]
    splits = reader.splits(problem, kv) if kv.num_quantized else 0
    launch, _, row_tiles = rows_of(problem, heads, tuning.DECODE)
    more = splits_of(problem, heads, recent, row_tiles, launch) if recent or not splits else 0
    parts = Parts(problem, splits + more)
    if not parts.lse.numel():
        return _nothing(problem)
    spans = flat((Span(0, kv.num_quantized, recent),)) if packed is None else None
    history = problem
    if packed is not None:
        history = replace(problem, kv_lens=packed.expand(problem.q.shape[0]))
    with on(problem.q.device):
        if splits:
            reader.scan(history, kv, parts, splits, with_sinks=not more)
        if more:
            scan(problem, Pages(), spans, recent, parts, splits, more, packed)
        return parts.joined(problem.q.dtype)


def _code_splits(problem: Problem, kv: QuantizedKV) -> int:
    heads = kv.recent_k.shape[1]
    launch, _, row_tiles = rows_of(problem, heads, tuning.DECODE_CODES)
    return splits_of(problem, heads, kv.num_quantized, row_tiles, launch)


def _scan_codes(
    problem: Problem, kv: QuantizedKV, parts: Parts, splits: int, *, with_sinks: bool
) -> None:
    heads = kv.recent_k.shape[1]
    launch, block_m, row_tiles = rows_of(problem, heads, tuning.DECODE_CODES)
    block_n = min(launch.block_n, kv.k_group & -kv.k_group)
    sizes = constants(problem)
    for name in ("BLOCK_D", "BLOCK_V"):
        sizes[name] = max(16, int(sizes[name]) // 2)
    score_args, groups = score_args_of(problem), problem.q.shape[1] // heads
    seqlen_info, _ = seqlen_info_of(problem, block_m, by_keys=False)
    quantized_kernel[(splits * row_tiles, problem.q.shape[0] * heads)](
        strided(problem.q),
        coded(kv.k),
        coded(kv.v),
        strided(parts.out[0]),
        parts.lse,
        seqlen_info,
        mask_args_of(problem),
        score_args if with_sinks else score_args._replace(sinks=None),
        block_lists_of(problem, row_tiles, block_m, block_n, groups=groups),
        problem.q.shape[2],
        kv.num_quantized,
        problem.q_offset,
        splits,
        parts.out.stride(0),
        parts.lse.stride(0),
        heads,
        groups,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BITS_K=kv.bits_k,
        BITS_V=kv.bits_v,
        FLOAT_K=kv.k.qdata.dtype == FP8,
        FLOAT_V=kv.v.qdata.dtype == FP8,
        K_GROUP=kv.k_group,
        V_GROUP=problem.v.shape[-1] // kv.v.scale.shape[3],
        FAST=problem.q.is_cuda,
        **sizes,
        **schedule(launch),
    )


def coded(stored: QuantizedTensor) -> Coded:
    """Planes of codes as bytes, whatever they are, of scales and of offsets."""
    qdata, *rest = (unit_rows(part) for part in stored)
    return Coded(*(strided(part) for part in (qdata.view(torch.uint8), *rest)))
