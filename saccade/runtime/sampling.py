"""From logits to a token, on the device of the logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Sampler:
    """Greedy, or sampling with temperature, top-k and top-p (nucleus, arXiv 1904.09751).

    Temperature, top-k and top-p are the logits processors of transformers, in its order.  One
    random number a token is drawn on the host, whatever the device, so a session that was saved
    on a GPU goes on with the same random numbers on a CPU.

    Args:
        temperature: 0 is greedy.
        top_k: sample among the k most likely tokens, and those as likely as the last of them;
            0 for all.
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
    _processors: list[Callable[..., Any]] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                f"{self.temperature}, {self.top_k} and {self.top_p}."
            )
        self._generator = torch.Generator().manual_seed(self.seed)

    def state(self) -> Tensor:
        """Where the random numbers are, uint8 `[n]` on the host."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Go on with the random numbers from a state."""
        self._generator.set_state(state)

    def pick(self, logits: Tensor) -> int:
        """The next token from logits `[vocab]`, of which only the token comes to the host.

        Raises:
            ValueError: logits that are NaN, where a random token is drawn.
            ModuleNotFoundError: a temperature above 0 without transformers.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        self._processors = self._processors or _processors(self)
        scores = logits.float()[None]
        if torch.are_deterministic_algorithms_enabled():
            scores = scores.cpu()  # running sums on a GPU add up in any order
        for process in self._processors:
            scores = process(None, scores)
        return self._draw(scores[0])

    def _draw(self, scores: Tensor) -> int:
        """A token with the probabilities `softmax(scores)`: where their running sum passes u."""
        sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        u = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        token = int(torch.searchsorted(sums, sums[-1:] * u, right=True))
        if token == len(sums):
            raise ValueError("expected logits that are numbers, got NaN. Check the model's dtype.")
        return token


def _processors(sampler: Sampler) -> list[Callable[..., Any]]:
    """What transformers applies to scores `[1, vocab]` before a token is drawn."""
    try:
        from transformers.generation import logits_process as hf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sampling with a temperature above 0 needs the package transformers. "
            'Run in the clone of saccade: pip install ".[hf]"',
            name=error.name,
        ) from error
    found: list[Callable[..., Any]] = [hf.TemperatureLogitsWarper(float(sampler.temperature))]
    if sampler.top_k:
        found.append(hf.TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1:
        found.append(hf.TopPLogitsWarper(sampler.top_p))
    return found
