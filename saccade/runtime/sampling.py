"""From logits to a token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Sampler:
    """Greedy, or sampling with temperature, top-k and top-p (nucleus, arXiv 1904.09751).

    Args:
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the most likely tokens that together reach this probability.
        seed: the same seed gives the same tokens.

    Raises:
        ValueError: temperature or top_k below 0, top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                f"{self.temperature}, {self.top_k} and {self.top_p}."
            )
        self._generator = torch.Generator().manual_seed(self.seed)

    def state(self) -> Tensor:
        """Where the random numbers are, uint8 `[n]`."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Go on with the random numbers from a state."""
        self._generator.set_state(state)

    def pick(self, logits: Tensor) -> int:
        """The next token from logits `[vocab]`."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, tokens = logits.float().cpu().sort(descending=True)
        if self.top_k:
            values, tokens = values[: self.top_k], tokens[: self.top_k]
        weights = (values / self.temperature).softmax(-1)
        if self.top_p < 1:
            # A token stays while the ones before it have not yet reached top_p.
            stay = weights.cumsum(-1) - weights < self.top_p
            weights = weights * stay
        return int(tokens[torch.multinomial(weights, 1, generator=self._generator)])
