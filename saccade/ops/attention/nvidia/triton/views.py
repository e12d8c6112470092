"""Attention over any view of a cache by the split-KV kernels, for few queries or many."""

from __future__ import annotations

from saccade.core import AttentionOutput, DenseKV, GrowingKV, PagedKV, QuantizedKV, RaggedKV
from saccade.ops.attention.call import AttentionCall
from saccade.ops.attention.nvidia.problem import Problem, paged_kv_lens, problem_of
from saccade.ops.attention.nvidia.triton.decode_launch import (
    decode_into,
    empty_output,
    flat_spans,
    kv_heads,
    num_splits,
    page_table_of,
    stored_tiling,
)
from saccade.ops.attention.nvidia.triton.quantized_decode_launch import (
    TRITON_READER,
    attend_quantized,
)
from saccade.ops.attention.nvidia.triton.split_kv import SplitKVPartials
from saccade.ops.gpu.kernel_args import PageTable
from saccade.ops.gpu.launching import on, unit_rows


def attend_view(call: AttentionCall) -> AttentionOutput:
    """Attention of a call over any view."""
    kv = call.kv
    if isinstance(kv, (QuantizedKV, GrowingKV)):
        return attend_quantized(call, TRITON_READER)
    if isinstance(kv, DenseKV):
        problem = problem_of(call, unit_rows(kv.k), unit_rows(kv.v), call.kv_lens)
        spans = None if kv.is_plain else flat_spans(kv.spans)
        return _attend(problem, PageTable(), spans, kv.k.shape[2])
    assert isinstance(kv, (PagedKV, RaggedKV))
    kv_lens = paged_kv_lens(call) if isinstance(kv, PagedKV) else kv.kv_lens
    problem = problem_of(call, unit_rows(kv.k), unit_rows(kv.v), kv_lens)
    if isinstance(kv, PagedKV):
        return _attend(problem, page_table_of(kv), None, kv.end)
    strides = (
        kv.page_table.stride(0),
        kv.page_table.stride(1),
        problem.k.stride(0),
        problem.v.stride(0),
    )
    return _attend(problem, PageTable(kv.page_table, *strides, kv.positions), None, kv.max_length)


def _attend(
    problem: Problem, pages: PageTable, spans: tuple[int, ...] | None, slots: int
) -> AttentionOutput:
    heads = kv_heads(problem, pages)
    splits = num_splits(problem, heads, slots, stored_tiling(problem, pages))
    partials = SplitKVPartials(problem, splits)
    if not partials.lse.numel():
        return empty_output(problem)
    with on(problem.q.device):
        decode_into(partials, problem, pages, spans, slots, first=0, splits=partials.splits)
        return partials.combine(problem.q.dtype)
