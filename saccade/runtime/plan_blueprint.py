"""Blueprint: the sizes of a model that its memory and its speed follow from."""

from __future__ import annotations

from dataclasses import dataclass

from saccade.runtime.model import ModelFacts


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
    """

    facts: ModelFacts
    weights: int
    hidden: int
    inner: int
    tied: bool
    idle: int = 0

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.weights * self.facts.dtype.itemsize

    @property
    def head(self) -> int:
        """Numbers of the output matrix."""
        return self.facts.vocab_size * self.hidden

    @property
    def layers(self) -> int:
        """Weights that each token of a prompt is multiplied by: all but embedding and output."""
        ends = self.head if self.tied else 2 * self.head
        return max(0, self.weights - self.idle - ends)
