"""The peers: what PyTorch itself offers for the same tensors, called as its users call it.

torch   torch.nn.functional.scaled_dot_product_attention with grouped heads
flex    torch.nn.attention.flex_attention, compiled (a minute a shape, so only on request)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.bench.cases import Case
from saccade.bench.inputs import Inputs
from saccade.core import DenseKV, KeyRange, Mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Result = Tensor | tuple[Tensor, ...]
Call = Callable[[], Result]
BLOCK = 128

QUOTED = (
    "llama.cpp, quoted from another run on two AVX2 cores (prefill 32/8 D128): "
    "f16 38 GF/s, q8_0 5, q4_0 3."
)


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer and how its call is made; `title` is its name in tables."""

    title: str
    make: Callable[[Case, Inputs], Call]


def sdpa(case: Case, inputs: Inputs) -> Call:
    """torch SDPA; a single token needs no mask, and a square prefill has `is_causal`."""
    assert case.window is None, "a mask in memory would be measured, not attention"
    causal = case.q_len > 1
    grouped = case.heads != case.kv_heads
    views = cycle(_dense_views(inputs))

    def forward() -> Tensor:
        view = next(views)
        return F.scaled_dot_product_attention(
            inputs.q, view.k, view.v, is_causal=causal, enable_gqa=grouped
        )

    return backward(forward, inputs) if case.work == "backward" else forward


def flex(case: Case, inputs: Inputs) -> Call:
    """FlexAttention, compiled; see `forget_compiled`."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = block_mask(case.mask, case.q_len, case.kv_len) if case.q_len > 1 else None
    grouped = case.heads != case.kv_heads
    views = cycle(_dense_views(inputs))

    def forward() -> Tensor:
        view = next(views)
        return compiled(inputs.q, view.k, view.v, block_mask=mask, enable_gqa=grouped)

    return forward


PEERS = {"torch": Peer("torch sdpa", sdpa), "flex": Peer("torch flex", flex)}


def forget_compiled() -> None:
    """Clear compiled kernels: after eight of them FlexAttention silently runs unfused."""
    torch._dynamo.reset()


def backward(forward: Callable[[], Tensor], inputs: Inputs) -> Call:
    """The backward pass alone: the graph is built once and kept."""
    with torch.enable_grad():
        out = forward()
    view = _dense_views(inputs)[0]
    leaves = (inputs.q, view.k, view.v)
    return lambda: torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)


def block_mask(mask: Mask, q_len: int, kv_len: int) -> BlockMask:
    """FlexAttention's mask from ours: its own builder materializes every pair."""
    from torch.nn.attention.flex_attention import BlockMask

    partial, full = block_lists(mask, q_len, kv_len)
    num_keys = -(-kv_len // BLOCK)
    offset = kv_len - q_len
    window = kv_len + q_len if mask.window is None else mask.window

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        distance = q + offset - k
        return (distance >= 0) & (distance < window)

    return BlockMask.from_kv_blocks(
        *_table(partial, num_keys),
        *_table(full, num_keys),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
    )


def block_lists(mask: Mask, q_len: int, kv_len: int) -> tuple[list[list[int]], list[list[int]]]:
    """For each block of queries the blocks of keys that are visible in part, and in full."""
    partial: list[list[int]] = []
    full: list[list[int]] = []
    offset = kv_len - q_len
    for start in range(0, q_len, BLOCK):
        first, last = start + offset, min(start + BLOCK, q_len) - 1 + offset
        seen = {
            block
            for keys in mask.key_ranges(first, last, kv_len)
            for block in range(keys.start // BLOCK, -(-keys.stop // BLOCK))
        }
        whole = {
            block
            for block in seen
            if (block + 1) * BLOCK <= kv_len
            and mask.is_full(first, last, KeyRange(block * BLOCK, (block + 1) * BLOCK))
        }
        partial.append(sorted(seen - whole))
        full.append(sorted(whole))
    return partial, full


def _table(blocks: list[list[int]], num_keys: int) -> tuple[Tensor, Tensor]:
    """Counts `[1, 1, rows]` and padded indices `[1, 1, rows, num_keys]`, int32."""
    counts = torch.tensor([len(row) for row in blocks], dtype=torch.int32)
    indices = torch.zeros(len(blocks), num_keys, dtype=torch.int32)
    for at, row in enumerate(blocks):
        indices[at, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return counts[None, None], indices[None, None]


def _dense_views(inputs: Inputs) -> list[DenseKV]:
    return [view for view in inputs.views if isinstance(view, DenseKV)]
