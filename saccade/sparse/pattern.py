"""The protocol of block-sparse patterns, and what those that follow a rule have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Protocol

from torch import Tensor

from saccade.core import BlockSelection, DenseKV, KVView, Unsupported
from saccade.core.kv import dense
from saccade.ops.kv_write.hadamard import hadamard_transform
from saccade.ops.selection import BlockRule, SummaryKind, select_blocks, summarize
from saccade.sparse.prompt import PromptPattern

MOST_QUERIES: Final = 16
"""More queries read all keys under a StepPattern: prompts."""


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


class StepPattern(ABC):
    """A pattern that selects for a few queries from their scores; more read all keys."""

    __slots__ = ()

    def reads_all(self, q_len: int) -> bool:
        """Whether so many queries read all keys."""
        return q_len > MOST_QUERIES

    @property
    @abstractmethod
    def rule(self) -> BlockRule:
        """What is read: for C++ layers, which select by it."""

    @property
    def reuse(self) -> tuple[int, tuple[int, ...]] | None:
        """(layer whose blocks are read, for each KV head the head of that layer); None: its own."""
        return None

    @abstractmethod
    def select(
        self, q: Tensor, kv: KVView, q_offset: int | Tensor, padding: Tensor | None = None
    ) -> BlockSelection:
        """See Pattern.

        Args:
            q_offset: in a captured step an int64 scalar on the device.
            padding: bool `[B, Lk]`, False for keys that are padding.
        """


class LayeredPattern(ABC):
    """A pattern that differs between the layers of a model."""

    __slots__ = ()

    @abstractmethod
    def layers(self, num_layers: int) -> Sequence[Pattern | None]:
        """What each layer of a run of a model follows, None for all keys.

        Raises:
            BadInput: a pattern for another number of layers.
        """


def selected(
    pattern: Pattern,
    q: Tensor,
    kv: KVView,
    q_offset: int,
    *,
    rows: Tensor | None = None,
    padding: Tensor | None = None,
) -> BlockSelection | None:
    """What a pattern selects, None for all keys.

    Args:
        rows: the summaries kept for a RulePattern, or None.
        padding: bool `[B, Lk]`, False for padding, which patterns that look at keys leave out.
    """
    if isinstance(pattern, PromptPattern | StepPattern):
        whole = pattern.reads_all(q.shape[2])
        return None if whole else pattern.select(q, kv, q_offset, padding)
    if not isinstance(pattern, RulePattern):
        return pattern.select(q, kv, q_offset)
    rule = pattern.rule
    whole = rule.reads_all or kv.shape[2] < rule.least
    return None if whole else pattern.select(q, kv, q_offset, rows)


def selected_in_step(
    pattern: Pattern, q: Tensor, kv: KVView, q_offset: Tensor, rows: Tensor | None
) -> BlockSelection | None:
    """What a pattern selects in a decoding step, None for all keys; see `selected`.

    The position of a step is a tensor on the device.

    Args:
        q_offset: int64 `[B]`, the same position in every row.
        rows: all memory of the summaries; blocks before the queries' own have theirs.

    Raises:
        Unsupported: a pattern that needs the host, or keys whose summaries lag behind.
    """
    if decodes_densely(pattern):
        return None
    if not isinstance(pattern, RulePattern | StepPattern) or not isinstance(kv, DenseKV):
        raise Unsupported(
            "a captured step selects by a RulePattern or Kascade over dense keys. "
            "Use Context.append."
        )
    if isinstance(pattern, StepPattern):
        return pattern.select(q, kv, q_offset[0])
    return select_blocks(pattern.rule, q, rows, q_offset[0], kv.shape[2])


def decodes_densely(pattern: Pattern | None) -> bool:
    """Whether decoding steps read all keys."""
    return pattern is None or isinstance(pattern, PromptPattern)


def of_layers(pattern: Pattern | None, num_layers: int) -> Sequence[Pattern | None]:
    """The pattern of each layer of a run of a model; None for all keys."""
    if isinstance(pattern, LayeredPattern):
        return pattern.layers(num_layers)
    first = pattern.first_layer(num_layers) if isinstance(pattern, PromptPattern) else 0
    return [pattern if index >= first else None for index in range(num_layers)]


def summary_of(pattern: Pattern | None) -> tuple[SummaryKind, int] | None:
    """(kind, tokens of a block) of the summaries that a pattern selects by; None for none."""
    if not isinstance(pattern, RulePattern) or pattern.rule.summary == "none":
        return None
    return pattern.rule.summary, pattern.rule.k_block
