"""Blueprint: the sizes of a model that its memory and its speed follow from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from saccade.runtime.model import ModelFacts
from saccade.runtime.weights import Matrix, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """Sizes of a model of decoder layers, known before anything of it is loaded.

    Attributes:
        facts: heads, layers, windows, dtype.
        weights: numbers in all parameters, tied ones counted once.
        hidden: width of the hidden states.
        inner: width of the MLP that one token goes through, of all its experts together.
        tied: whether the embedding is the output matrix too.
        idle: weights of experts that one token does not use.
        matrices: of linear layers and embeddings; empty where they are not known one by one, and
            then all weights are plain numbers.
        held: how they lie in memory, see `runtime.weights.held_as`.
    """

    facts: ModelFacts
    weights: int
    hidden: int
    inner: int
    tied: bool
    idle: int = 0
    matrices: tuple[Matrix, ...] = ()
    held: str = "plain"

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters."""
        dtype = self.facts.dtype
        plain = self.weights - sum(each.numbers for each in self.matrices)
        packed = sum(each.n_bytes(self.held, dtype) for each in self.matrices)
        return packed + plain * dtype.itemsize

    def holding(self, held: str, dtype: torch.dtype | None = None) -> Blueprint:
        """The same model with its weights held another way, in the same dtype or another one."""
        facts = replace(self.facts, dtype=dtype or self.facts.dtype)
        return replace(self, facts=facts, held=held)

    def stored(self, matrix: Matrix) -> Stored:
        """How a matrix lies in memory."""
        return matrix.stored(self.held, self.facts.dtype)

    def kinds(self) -> list[str]:
        """What the weights are, the most frequent first: names of the file, or of the choice."""
        numbers: Counter[str] = Counter()
        for each in self.matrices:
            numbers[self._called(each)] += each.numbers
        return [kind for kind, _ in numbers.most_common()]

    def _called(self, matrix: Matrix) -> str:
        stored = self.stored(matrix)
        if isinstance(stored, torch.dtype):
            return str(stored).removeprefix("torch.")
        return matrix.kind if self.held == "file" else self.held

    def read_in(self) -> Mapping[Stored, int]:
        """How many numbers of the layers, which every token is multiplied by, lie in each form."""
        found: Counter[Stored] = Counter()
        for each in self.matrices:
            if each.is_read and not each.is_head:
                found[self.stored(each)] += each.numbers
        found[self.facts.dtype] += max(0, self.layers - found.total())  # norms, biases, experts
        return {form: numbers for form, numbers in found.items() if numbers}

    def head_in(self) -> Stored:
        """The form of the output matrix."""
        heads = [each for each in self.matrices if each.is_head]
        return self.stored(heads[0]) if heads else self.facts.dtype

    @property
    def head(self) -> int:
        """Numbers of the output matrix."""
        return self.facts.vocab_size * self.hidden

    @property
    def layers(self) -> int:
        """Weights that each token of a prompt is multiplied by: all but embedding and output."""
        ends = self.head if self.tied else 2 * self.head
        return max(0, self.weights - self.idle - ends)
