"""Generation that guesses tokens and takes wrong ones back, over caches that cannot go back.

transformers crops the cache by the guesses that were wrong.  A ring has overwritten the keys that
the tokens before them attend to, so that is known before anything is generated.
"""

from __future__ import annotations

from typing import Any, Final

from saccade.cache import SlidingCache, StateCache
from saccade.core import Unsupported
from saccade.hf.cache import SaccadeCache
from saccade.hf.generate_options import option

_GUESSING: Final = (
    "prompt_lookup_num_tokens",
    "assistant_model",
    "assistant_early_exit",
    "use_mtp",
)
"""Arguments of `generate`, or fields of its config, that make it guess tokens."""


def guesses(model: Any, kwargs: dict[str, Any]) -> str | None:
    """What makes `generate` with these arguments guess tokens; None where nothing does."""
    return next((name for name in _GUESSING if option(kwargs, name, model)), None)


def check_not_cropped(model: Any, kwargs: dict[str, Any]) -> None:
    """Raise Unsupported where `generate` would crop one of our caches that cannot go back."""
    caches = kwargs.get("past_key_values")
    if not isinstance(caches, SaccadeCache):
        return
    found, stores = guesses(model, kwargs), caches.stores
    fixed = next((x for x in stores if isinstance(x, SlidingCache | StateCache)), None)
    if found is None or fixed is None:
        return
    kept = "a window of tokens" if isinstance(fixed, SlidingCache) else "recurrent states"
    raise Unsupported(
        f"{found} guesses tokens and takes wrong ones back, but layers of this cache keep {kept} "
        f"and cannot go back. Leave {found} out, or n_swa unset."
    )
