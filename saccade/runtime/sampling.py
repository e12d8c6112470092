"""From logits to a token, on the device of the logits."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Sampler:
    """Greedy, or sampling with temperature, top-k and top-p (nucleus, arXiv 1904.09751).

    Top-k and top-p are the logits processors of transformers, in its order.  One random number a
    token is drawn on the host, whatever the device, so a session that was saved on a GPU goes on
    with the same random numbers on a CPU.

    Args:
        temperature: 0 is greedy; infinity draws all tokens that are possible alike.
        top_k: sample among the k most likely tokens, and those as likely as the last of them;
            0 for all.
        top_p: sample among the most likely tokens that together reach this probability.
        seed: the same seed gives the same tokens; from -2^63 to 2^64 - 1.

    Raises:
        ValueError: temperature below 0 or NaN, top_k below 0, top_p outside (0, 1], another seed.
        TypeError: something else than numbers, or than whole numbers for top_k and seed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)
    _processors: list[Callable[..., Any]] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        self.temperature, self.top_p = (
            _number(name, getattr(self, name)) for name in ("temperature", "top_p")
        )
        self.top_k, self.seed = (_whole(name, getattr(self, name)) for name in ("top_k", "seed"))
        for name, allowed, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0 and up to 1"),
        ):
            if not allowed:
                raise ValueError(f"{name} has to be {expected}, got {getattr(self, name)}.")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"a seed is expected from -2^63 to 2^64 - 1, got {self.seed}.")
        self._generator = torch.Generator().manual_seed(self.seed)

    def state(self) -> Tensor:
        """Where the random numbers are, uint8 `[n]` on the host."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Go on with the random numbers from a state."""
        self._generator.set_state(state)

    def ahead(self) -> Sampler:
        """Another one that draws the random numbers that this one is about to draw.

        Of a subclass too it is a plain Sampler: what that does beside choosing is not done twice.
        """
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        other = Sampler(**given)
        other.restore(self.state())
        return other

    def pick(self, logits: Tensor) -> int:
        """The next token from logits `[vocab]`, of which only the token comes to the host.

        A logit of +inf is certain: one of those tokens is taken.

        Raises:
            ValueError: logits of another shape, with a NaN, or -inf for every token.
            ModuleNotFoundError: top_k or top_p at a temperature above 0 without transformers.
        """
        largest, token = _largest(logits)
        if self.temperature == 0:
            return token
        scores = self._scaled(logits, largest)[None]
        if torch.are_deterministic_algorithms_enabled():
            scores = scores.cpu()  # running sums on a GPU add up in any order
        self._processors = self._processors or _processors(self)
        for process in self._processors:
            scores = process(None, scores)
        return self._draw(scores[0])

    def _scaled(self, logits: Tensor, largest: float) -> Tensor:
        """Float32 `(logits - largest) / temperature`, for any temperature above 0.

        The difference is divided, in float64, so that nothing overflows but what is impossible.
        """
        if largest == math.inf:
            return torch.where(logits == math.inf, 0.0, -math.inf)
        scores = (logits.double() - largest) / self.temperature
        scores[logits == -math.inf] = -math.inf  # -inf / inf is NaN
        scores[logits == largest] = 0.0
        return scores.float()

    def _draw(self, scores: Tensor) -> int:
        """A token with the probabilities `softmax(scores)`: where their running sum passes u."""
        sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
        u = torch.rand((), dtype=torch.float64, generator=self._generator).item()
        token = int(torch.searchsorted(sums, sums[-1:] * u, right=True))
        return min(token, len(sums) - 1)


def _largest(logits: Tensor) -> tuple[float, int]:
    """(largest logit, its token), refusing what has none."""
    if logits.ndim != 1 or not len(logits):
        raise ValueError(f"expected logits [vocab], got the shape {list(logits.shape)}.")
    found = logits.max(0)
    if logits.is_cpu:
        largest, token = found.values.item(), found.indices.item()
    else:  # one copy to the host
        largest, token = torch.stack((found.values.double(), found.indices.double())).tolist()
    if math.isnan(largest):
        raise ValueError(
            "expected logits that are numbers, got NaN. Check the model's weights and dtype: "
            "float16 overflows in some models, bfloat16 and float32 do not."
        )
    if largest == -math.inf:
        raise ValueError("expected a logit above -inf, got none: no token is possible.")
    return largest, int(token)


def _number(name: str, value: Any) -> float:
    try:
        return operator.truediv(value, 1)
    except (TypeError, OverflowError) as error:
        raise TypeError(f"{name} is expected to be a number, got {value!r}.") from error


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} is expected to be a whole number, got {value!r}.") from error


def _processors(sampler: Sampler) -> list[Callable[..., Any]]:
    """What transformers applies to scores `[1, vocab]` before a token is drawn."""
    if not sampler.top_k and sampler.top_p == 1:
        return []
    try:
        from transformers.generation import logits_process as hf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sampling with top_k or top_p needs the package transformers. "
            'Run in the clone of saccade: pip install ".[hf]"',
            name=error.name,
        ) from error
    found: list[Callable[..., Any]] = []
    if sampler.top_k:
        found.append(hf.TopKLogitsWarper(sampler.top_k))
    if sampler.top_p < 1:
        found.append(hf.TopPLogitsWarper(sampler.top_p))
    return found
