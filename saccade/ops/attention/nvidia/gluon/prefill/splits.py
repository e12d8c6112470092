"""Few queries over many keys: heads share a tile of queries, and CTAs share the keys.

A tile of 128 queries of one head is mostly empty where a chat goes on by a sentence, and one tile a
head leaves multiprocessors idle.  So the queries of several heads of a KV head fill a tile together
(packed GQA), and the keys are divided into splits, combined afterwards (split-KV).
Source: Dao et al., Flash-Decoding, 2023; FlashAttention-3's `pack_gqa`.
"""

from __future__ import annotations

from typing import NamedTuple

from saccade.ops.attention.nvidia.problem import Problem
from saccade.ops.gpu.intmath import cdiv

MAX_SPLITS = 32
MAX_PACK = 16
SPLIT_KEYS = 512  # a shorter split costs more to combine than it saves


class Sharing(NamedTuple):
    """How a problem is shared out.

    Attributes:
        pack: heads whose queries a tile holds, a power of two that divides a KV head's heads.
        splits: of the keys.
    """

    pack: int
    splits: int


NOT_SHARED = Sharing(1, 1)


def sharing_of(problem: Problem, rows: int, ctas: int) -> Sharing:
    """Heads a tile and splits of the keys: (1, 1) where tiles of one head fill the GPU.

    Args:
        rows: of a tile; ctas: that run at one time.
    """
    call, (batch, heads, q_len, _) = problem.call, problem.q.shape
    if problem.cu_q is not None or problem.block_mask is not None or call.sink_logits is not None:
        return NOT_SHARED
    if not q_len or cdiv(q_len, rows) * batch * heads >= ctas:
        return NOT_SHARED
    pack = _power_of_two_in(heads // problem.k.shape[1])
    tiles = cdiv(q_len, rows // pack) * batch * heads // pack
    reach, mask = problem.num_keys, problem.mask
    if mask.window is not None:
        reach = min(reach, mask.window + q_len + mask.sinks)
    splits = num_splits(tiles, ctas, min(MAX_SPLITS, reach // SPLIT_KEYS))
    return Sharing(pack, splits) if splits > 1 else NOT_SHARED


def num_splits(tiles: int, ctas: int, most: int) -> int:
    """The fewest splits, of at most `most`, whose rounds take within a tenth of the least time."""
    if most < 2:
        return 1
    times = [cdiv(tiles * splits, ctas) / splits for splits in range(1, most + 1)]
    enough = 1.1 * min(times)
    return next(splits for splits, time in enumerate(times, 1) if time <= enough)


def _power_of_two_in(count: int) -> int:
    """The largest power of two that divides `count`, at most MAX_PACK."""
    return min(count & -count, MAX_PACK)
