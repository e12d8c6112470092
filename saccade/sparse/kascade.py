"""Exact top-k in a few layers, whose blocks the layers behind them read too.

Kascade (arXiv 2512.16391): neighbouring layers attend to much the same keys.  In an anchor layer a
step scores all keys, so its blocks are those that do receive most of the softmax weights; the
layers up to the next anchor read the same blocks without scoring anything.  Which layers are
anchors, and whose blocks each KV head takes, is measured once for a model and kept as a KascadePlan
(`saccade.hf.kascade.calibrate_kascade`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import local

import torch
from torch import Tensor

from saccade.core import BadInput, BlockSelection, KVView, Unsupported
from saccade.ops.selection import BlockRule, select_blocks
from saccade.sparse.kascade_plan import KascadePlan, Reuse
from saccade.sparse.pattern import MOST_QUERIES, LayeredPattern, Pattern, StepPattern
from saccade.sparse.prompt import keys_by_position
from saccade.sparse.sizes import check_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Kascade(StepPattern, LayeredPattern):
    """The `top` key blocks with the largest softmax weights, chosen in anchor layers alone.

    The first layer reads all keys, and so do more than 16 queries: the pattern is for decoding.
    Without a plan all layers behind the first are anchors: no choice of `top` blocks keeps more,
    and it takes longer than dense attention.

    Args:
        plan: the anchors of this model, see `saccade.hf.kascade.calibrate_kascade`.
        block: tokens in a block of keys.
        top: key blocks chosen by their weights among those that are not read anyway; one choice
            serves all queries of a step and all query heads of a KV head, by the sum of weights.
        sink_blocks: first key blocks, always read; those of a padded row are its first real ones.
        window_blocks: most recent key blocks, always read, the current one counted.

    Raises:
        TypeError, ValueError: block or window_blocks below 1, sink_blocks or top below 0; a plan
            that is none.
    """

    plan: KascadePlan | None = None
    block: int = 64
    top: int = 16
    sink_blocks: int = 1
    window_blocks: int = 2

    def __post_init__(self) -> None:
        check_sizes(self, block=1, window_blocks=1, sink_blocks=0, top=0)
        if not isinstance(self.plan, KascadePlan | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(
                f"Kascade.plan must be a KascadePlan or None, got {self.plan!r}. Use "
                "KascadePlan.load(path)."
            )

    @property
    def rule(self) -> BlockRule:
        """What an anchor reads."""
        return BlockRule(
            summary="keys", q_block=MOST_QUERIES, k_block=self.block,
            sinks=self.sink_blocks, window=self.window_blocks, top=self.top,
        )  # fmt: skip

    def select(
        self, q: Tensor, kv: KVView, q_offset: int | Tensor, padding: Tensor | None = None
    ) -> BlockSelection:
        """See StepPattern; the blocks of an anchor."""
        num_keys = kv.shape[2]
        if self.reads_all(q.shape[2]):
            window = -(-num_keys // self.block) + 1
            rule = BlockRule(
                summary="none", q_block=self.block, k_block=self.block, sinks=0, window=window
            )
            return select_blocks(rule, q, None, q_offset, num_keys)
        k, real = keys_by_position(kv, padding)
        return select_blocks(self.rule, q, k, q_offset, num_keys, real)

    def layers(self, num_layers: int) -> Sequence[Pattern | None]:
        """See LayeredPattern."""
        if self.plan is None:
            return [self if index else None for index in range(num_layers)]
        if len(self.plan.layers) != num_layers:
            raise BadInput(
                f"the plan of Kascade is for a model of {len(self.plan.layers)} layers, this one "
                f"has {num_layers}. Calibrate this model (saccade.hf.kascade)."
            )
        chosen, found = _Chosen(), list[Pattern | None]()
        for index, reuse in enumerate(self.plan.layers):
            if reuse is None:
                found.append(None)
            elif reuse.anchor == index:
                found.append(_Anchor(self, chosen, index))
            else:
                found.append(_Follower(self, chosen, reuse))
        return found


class _Chosen(local):
    """What the anchors of a run chose last, in each thread."""

    def __init__(self) -> None:
        self.of: dict[int, tuple[object, BlockSelection]] = {}


@dataclass(frozen=True, slots=True)
class _Layer(StepPattern):
    pattern: Kascade
    chosen: _Chosen

    @property
    def rule(self) -> BlockRule:
        return self.pattern.rule


@dataclass(frozen=True, slots=True)
class _Anchor(_Layer):
    layer: int

    def select(
        self, q: Tensor, kv: KVView, q_offset: int | Tensor, padding: Tensor | None = None
    ) -> BlockSelection:
        found = self.pattern.select(q, kv, q_offset, padding)
        self.chosen.of[self.layer] = _call(q, kv, q_offset), found
        return found


@dataclass(frozen=True, slots=True)
class _Follower(_Layer):
    source: Reuse

    @property
    def reuse(self) -> tuple[int, tuple[int, ...]]:
        return self.source.anchor, self.source.heads

    def select(
        self, q: Tensor, kv: KVView, q_offset: int | Tensor, padding: Tensor | None = None
    ) -> BlockSelection:
        call, found = self.chosen.of.get(self.source.anchor, (None, None))
        if found is None or call != _call(q, kv, q_offset):
            raise Unsupported(
                f"a layer reuses the blocks of layer {self.source.anchor}, which chose none for "
                "these queries and keys. Use Kascade where all layers read the same tokens."
            )
        heads, own = list(self.source.heads), found.allowed.shape[1]
        if heads == list(range(own)):
            return found
        allowed = torch.stack([found.allowed[:, head] for head in heads], 1)
        return BlockSelection(allowed=allowed, q_block=found.q_block, k_block=found.k_block)


def _call(q: Tensor, kv: KVView, q_offset: int | Tensor) -> object:
    """What the calls of all layers in one pass of a model have in common."""
    at = q_offset if isinstance(q_offset, int) else "step"
    return at, q.shape[0], q.shape[2], kv.shape[2]
