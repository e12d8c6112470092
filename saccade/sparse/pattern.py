"""The protocol of block-sparse patterns, and what those that follow a rule have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from saccade.core import BlockSelection, DenseKV, KVView, Unsupported
from saccade.core.kv import dense
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.selection import BlockRule, SummaryKind, select_blocks, summarize


class Pattern(Protocol):
    """Chooses which blocks of keys each block of queries attends to."""

    def select(self, q: Tensor, kv: KVView, q_offset: int) -> BlockSelection:
        """The selected blocks; the operator intersects them with the mask of the call.

        Args:
            q: queries `[B, H, Lq, D]`, after RoPE.
            kv: the view they attend to, `[B, Hkv, end, D]`.
            q_offset: position of the first query.
        """
        ...


class RulePattern(ABC):
    """A pattern that is a BlockRule: caches keep the summaries for it, and C++ layers follow it."""

    __slots__ = ()

    @property
    @abstractmethod
    def rule(self) -> BlockRule:
        """What is read."""

    def select(
        self, q: Tensor, kv: KVView, q_offset: int, rows: Tensor | None = None
    ) -> BlockSelection:
        """See Pattern.

        Args:
            rows: summaries of the first blocks of `kv`, see `ops.selection.summarize`; None: they
                are made here, which reads all keys.
        """
        rule = self.rule
        if rows is None and rule.summary != "none":
            k = dense(kv).k
            k = hadamard_transform(k) if kv.hadamard else k
            rows = summarize(k, rule.k_block, rule.summary)
        return select_blocks(rule, q, rows, q_offset, kv.shape[2])


def selected(
    pattern: Pattern, q: Tensor, kv: KVView, q_offset: int, rows: Tensor | None
) -> BlockSelection | None:
    """What a pattern selects, None for all keys; `rows`: the summaries kept for it, or None."""
    if not isinstance(pattern, RulePattern):
        return pattern.select(q, kv, q_offset)
    return None if kv.shape[2] < pattern.rule.least else pattern.select(q, kv, q_offset, rows)


def selected_in_step(
    pattern: Pattern, q: Tensor, kv: KVView, q_offset: Tensor, rows: Tensor | None
) -> BlockSelection:
    """What a pattern selects in a decoding step, whose position is a tensor on the device.

    Args:
        q_offset: int64 `[B]`, the same position in every row.
        rows: all memory of the summaries; blocks before the queries' own have theirs.

    Raises:
        Unsupported: a pattern without a rule, or keys whose summaries lag behind.
    """
    if not isinstance(pattern, RulePattern) or not isinstance(kv, DenseKV):
        raise Unsupported(
            "a captured step selects by a RulePattern over dense keys. Use Context.append."
        )
    return select_blocks(pattern.rule, q, rows, q_offset[0], kv.shape[2])


def summary_of(pattern: Pattern | None) -> tuple[SummaryKind, int] | None:
    """(kind, tokens of a block) of the summaries that a pattern selects by; None for none."""
    if not isinstance(pattern, RulePattern) or pattern.rule.summary == "none":
        return None
    return pattern.rule.summary, pattern.rule.k_block
