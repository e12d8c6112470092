"""FlexAttention as a peer on a GPU: tuned options, fresh compile state, and really fused.

FlexAttention compiles anew for every mask function; after eight of them it runs unfused and does
not say so.  So the compile state is cleared before each case, a few sets of options are compiled
and the fastest counts, and a call that takes as much memory as the scores would is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from saccade.bench.gpu import seconds
from saccade.bench.peers import BLOCK, block_mask, forget_compiled
from saccade.core import Mask

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
)
Check = Callable[[Tensor], float]


def window_mask(window: int | None, length: int) -> BlockMask:
    """Causal, with a window: whole blocks are full, those at an edge partial."""
    return block_mask(Mask(window=window), length, length).to("cuda")


def selection_mask(allowed: Tensor, groups: int) -> BlockMask:
    """Causal attention of a selection of blocks `[1, Hkv, n, n]`, for Hkv * groups query heads."""
    count = allowed.shape[-1]
    below = torch.ones(count, count, dtype=torch.bool, device=allowed.device).tril(-1)
    wide = allowed.repeat_interleave(groups, 1)
    edge = torch.eye(count, dtype=torch.bool, device=allowed.device)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    return BlockMask.from_kv_blocks(
        *_indices(wide & edge), *_indices(wide & below), BLOCK_SIZE=BLOCK, mask_mod=causal
    )


def _indices(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts `[B, H, rows]` and indices `[B, H, rows, columns]`, int32, seen blocks first."""
    order = torch.argsort(seen.to(torch.int8), dim=-1, descending=True, stable=True)
    return seen.sum(-1, dtype=torch.int32), order.to(torch.int32)


def fastest(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, check: Check
) -> tuple[float, dict[str, Any], list[str]]:
    """(seconds, options, what went wrong with others) of the best set of options.

    Args:
        check: raises where a result is wrong.
    """
    best, chosen, failed = float("inf"), {}, []
    scores = q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    for options in OPTIONS:
        forget_compiled()
        compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

        def run(compiled: Any = compiled, options: dict[str, Any] = options) -> Tensor:
            return compiled(
                q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1],
                kernel_options=options,
            )  # fmt: skip

        try:
            check(run())
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            if torch.cuda.max_memory_allocated() - before > scores / 8:
                raise RuntimeError("it is not fused: it takes the memory of the scores")
            took = seconds(run, 9, 3)
        except Exception as error:  # options that do not fit must not cost the others
            failed.append(f"{options}: {' '.join(str(error).split())[:120]}")
            continue
        if took < best:
            best, chosen = took, options
    forget_compiled()
    return best, chosen, failed
