"""Dynamic sparsity for prompts: blocks scored by the sums along their antidiagonals.

XAttention (Xu et al., arXiv 2503.16428): with stride S, the sum over s of

    q[i S + S-1-s] . k[j S + s]

runs along an antidiagonal of a square of S x S scores, which crosses every column and every
diagonal of the square.  Queries and keys laid side by side S at a time make one product of S D
channels of it, 1/S of the work of all scores.
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
class XAttention(PromptPattern):
    """The fewest key blocks that hold a share of the attention, as antidiagonals estimate it.

    Scores are those of `q . k / sqrt(D)`, softmax is taken over squares, each query head on its
    own, and the weights of the heads that share a KV head are added.  Decoding reads all keys.

    Args:
        block: tokens in a block of queries and of keys.
        stride: tokens in a side of the squares; a divisor of block.  Scoring costs 1/stride of
            the products of queries and keys.
        p: share of the estimated attention, in (0, 1]; blocks that are always read count.  1 reads
            all blocks.
        sink_blocks: first key blocks, always read.
        window_blocks: most recent key blocks, always read, the current one counted.

    Raises:
        TypeError, ValueError: block, stride or window_blocks below 1, sink_blocks below 0, a
            stride that does not divide block, p out of range.
    """

    block: int = 64
    stride: int = 16
    p: float = 0.95
    sink_blocks: int = 1
    window_blocks: int = 1

    def __post_init__(self) -> None:
        check_sizes(self, block=1, stride=1, window_blocks=1, sink_blocks=0)
        check_share("p", self.p)
        if self.block % self.stride:
            raise ValueError(
                f"XAttention.stride must divide block={self.block}, got {self.stride}. Take a "
                "divisor, such as 8 or 16 for blocks of 64."
            )

    @property
    def is_dense(self) -> bool:
        """See PromptPattern."""
        return self.p >= 1

    def chosen(self, call: PromptCall) -> Tensor:
        """The best other blocks, until the share is reached."""
        weights = self._weights(call)
        kept = (weights * call.always).sum(-1, keepdim=True)
        missing = self.p * weights.sum(-1, keepdim=True) - kept
        ordered, order = weights.masked_fill(call.always, 0).sort(-1, descending=True)
        wanted = ordered.cumsum(-1) - ordered < missing
        return torch.zeros_like(wanted).scatter(-1, order, wanted)

    def _weights(self, call: PromptCall) -> Tensor:
        """Estimated attention of blocks of queries to blocks of keys, `[B, Hkv, q_blocks, n]`."""
        (k, real), num_blocks = call.keys(), call.seen.shape[1]
        side_by_side = _in_squares(k, self.stride, k.shape[2] // self.stride)
        if real is not None:
            real = _in_squares(real[..., None], self.stride, side_by_side.shape[2]).any(-1)
        found = list[Tensor]()
        for at, q in call.pieces(self.block):
            weights = self._piece(q, side_by_side, call.q_offset + at, real)
            found.append(pad(weights, (0, num_blocks - weights.shape[3])))
        return torch.cat(found, dim=2)

    def _piece(self, q: Tensor, k: Tensor, start: int, real: Tensor | None) -> Tensor:
        """`_weights` of queries from position `start` on, of the blocks that they see.

        Args:
            k: keys side by side `[B, Hkv, squares, stride D]`; real: bool, which have a key.
        """
        stride, per, length = self.stride, self.block // self.stride, q.shape[2]
        rows = -(-length // stride)
        columns = min(k.shape[2], -(-(start + length) // stride))
        q = pad(q * (q.shape[3] ** -0.5 / stride), (0, 0, 0, rows * stride - length))
        q = q.unflatten(2, (rows, stride)).flip(3).flatten(3)  # the antidiagonal
        q = q.unflatten(1, (k.shape[1], -1))
        scores = products(q.flatten(2, 3), k[:, :, :columns]).unflatten(2, q.shape[2:4])
        first = min(columns, start // stride)  # squares before it are seen by all queries
        last = start + (torch.arange(1, rows + 1, device=q.device) * stride).clamp_max(length) - 1
        later = torch.arange(first, columns, device=q.device) * stride > last[:, None]
        scores[..., first:].masked_fill_(later, -torch.inf)
        if real is not None:
            scores.masked_fill_(~real[:, :, None, None, :columns], -torch.inf)
        weights = scores.softmax(-1)
        weights = (weights if real is None else weights.nan_to_num_(0)).sum(2)
        weights = pad(weights, (0, -columns % per, 0, -rows % per))
        return weights.unflatten(3, (-1, per)).sum(4).unflatten(2, (-1, per)).sum(3)


def _in_squares(x: Tensor, stride: int, count: int) -> Tensor:
    """`count` groups of `stride` rows of `[B, H, n, D]` side by side, `[B, H, count, stride D]`."""
    return x[:, :, : count * stride].unflatten(2, (count, stride)).flatten(3)
