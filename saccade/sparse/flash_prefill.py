"""Dynamic sparsity for prompts: blocks whose weight is not small beside the largest of their row.

FlashPrefill (arXiv 2603.06199): every query is scored on the mean key of each block,

    s(a, b) = sum over queries i of block a of exp(z(i, b) - max_j z(i, j)),
    z(i, b) = q_i . mean_b / sqrt(D)

and block b is read where s(a, b) is at least `alpha` times the largest of its row.  Nothing is
sorted or added up along a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.selection import products
from saccade.sparse.prompt import PromptCall, PromptPattern
from saccade.sparse.sizes import check_share, check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashPrefill(PromptPattern):
    """Key blocks that weigh at least a share of the heaviest one of their row.

    Queries are scored one by one, keys by the means of their blocks, so scoring costs 1/block of
    the products of queries and keys.  A block is read where one of the query heads that share its
    KV head asks for it.  Decoding reads all keys, and so do the last queries of a prompt.

    Args:
        block: tokens in a block of queries and of keys.
        alpha: share of the largest weight of a row, in (0, 1]; the paper takes 0.18 for Llama and
            0.08 to 0.12 for Qwen, for blocks of 128.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.
        dense_rows: queries at the end of the prompt that read all keys, rounded up to blocks.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, sink_blocks or dense_rows below 0,
            alpha out of range.
    """

    block: int = 64
    alpha: float = 0.18
    sink_blocks: int = 2
    window_blocks: int = 4
    dense_rows: int = 256

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0, dense_rows=0)
        check_share("alpha", self.alpha)

    def chosen(self, call: PromptCall) -> Tensor:
        """Blocks at or above the threshold of their row, and all of the last rows."""
        (k, real), size = call.keys(), self.block
        means = _means(k, real, size)
        found = [self._piece(q, means, call.seen[at // size :]) for at, q in call.pieces(size)]
        return torch.cat(found, dim=2) | call.last_rows(size, self.dense_rows)

    def _piece(self, q: Tensor, means: tuple[Tensor, Tensor], seen: Tensor) -> Tensor:
        """Blocks at or above the threshold for some queries, `[B, Hkv, q_blocks, k_blocks]`.

        Args:
            seen: bool `[q_blocks or more, k_blocks]`.
        """
        (k, there), length = means, q.shape[2]
        q = (q * q.shape[3] ** -0.5).unflatten(1, (k.shape[1], -1))
        scores = products(q.flatten(2, 3), k).unflatten(2, q.shape[2:4])  # [B, Hkv, G, Lq, n]
        seen = seen[: -(-length // self.block)].repeat_interleave(self.block, 0)[:length]
        unread = ~(seen & there[:, :, None, None])
        scores.masked_fill_(unread, -torch.inf)
        most = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
        weights = pad((scores - most).exp_(), (0, 0, 0, -length % self.block))
        weights = weights.unflatten(3, (-1, self.block)).sum(4)  # [B, Hkv, G, q_blocks, n]
        least = self.alpha * weights.amax(-1, keepdim=True)
        return ((weights >= least) & (weights > 0)).any(2)


def _means(k: Tensor, real: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Mean key of each block `[B, Hkv, n, D]`, and which blocks have a key, `[B | 1, Hkv | 1, n]`.

    Args:
        real: bool `[B, Hkv | 1, Lk]`, False where `k`, then 0, is no key; None: all are keys.
    """
    real = k.new_ones(1, 1, k.shape[2], dtype=torch.bool) if real is None else real
    count = pad(real, (0, -k.shape[2] % size)).unflatten(2, (-1, size)).sum(3)
    sums = (
        pad(k, (0, 0, 0, -k.shape[2] % size)).unflatten(2, (-1, size)).sum(3, dtype=torch.float32)
    )
    return (sums / count.clamp_min(1)[..., None]).to(k.dtype), count > 0
