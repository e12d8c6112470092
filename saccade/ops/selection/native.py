"""Selections by the C++ kernels (csrc/select_blocks.h), which check all of it again."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.attention.cpu.binding import BUILT, extension, is_strided, record, target
from saccade.ops.planning import planning
from saccade.ops.selection.rule import BlockRule

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def usable(q: Tensor, rows: Tensor | None) -> bool:
    """Whether the kernels can read these tensors."""
    if not BUILT or planning() or torch.compiler.is_compiling():
        return False
    given = (q,) if rows is None else (q, rows)
    plain = all(type(x) is Tensor and x.is_cpu and x.dtype in _FLOATS for x in given)
    return plain and not any(map(is_strided, given)) and extension() is not None


def select(
    rule: BlockRule, q: Tensor, rows: Tensor | None, q_offset: int, num_blocks: int
) -> Tensor:
    """bool `[B | 1, Hkv | 1, q_blocks, num_blocks]`; see `select_blocks`."""
    kernels = extension()
    assert kernels is not None
    if rows is None:  # the same for all rows and heads
        q = q[:1, :1]
    heads = 1 if rows is None else rows.shape[1]
    q_blocks = -(-q.shape[2] // rule.q_block)
    out = torch.empty(q.shape[0], heads, q_blocks, num_blocks, dtype=torch.bool, device="cpu")
    numbers, summaries = rule.numbers(q.shape[3] ** -0.5), None if rows is None else record(rows)
    threads = torch.get_num_threads()
    kernels.select_blocks(numbers, record(q), q_offset, summaries, record(out), threads, target())
    return out
