"""What a context has done, and how a stream came to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "context"]
"""Why a stream ended: an end token, n_predict tokens, or a full context."""
OnProgress = Callable[[int, int], None]
"""Called after every chunk of a prompt with (tokens read of it, tokens it has); it may raise, and
what was read so far stays."""


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of `Context.stream`, as its id."""

    token: int


@dataclass(slots=True, kw_only=True)
class Stats:
    """What a context has done so far.

    Attributes:
        prompt_tokens, decode_tokens: tokens read in prompts, and tokens generated.
        prefill_seconds, decode_seconds: wall time they took.
        ttft_seconds: from the beginning of the last stream to its first token, None before one.
        cache_bytes: bytes of all caches at the last generated token.
        drafted, accepted: tokens that were drafted, and those of them that were generated.
        draft_rounds: how often some were drafted and then verified at once.
    """

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    ttft_seconds: float | None = None
    cache_bytes: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_rounds: int = 0

    @property
    def accepted_length(self) -> float | None:
        """Tokens accepted of a draft, on average; None where nothing was drafted."""
        return self.accepted / self.draft_rounds if self.draft_rounds else None

    @property
    def prefill_tps(self) -> float | None:
        """Tokens of prompts read a second, None before any."""
        return _rate(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_tps(self) -> float | None:
        """Tokens generated a second behind the first one, None before any."""
        return _rate(self.decode_tokens, self.decode_seconds)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds else None
