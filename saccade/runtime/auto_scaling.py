"""Texts beyond the trained length: which scaling of positions reaches them, chosen where none was.

Rotary positions past the trained length are angles that the model never saw, and its text falls
apart.  YaRN (arXiv 2309.00071) maps the longer text onto angles that it knows, with the factor
`tokens / trained length`.  A model that was trained with a scaling of its own keeps that rule, with
a larger factor: its fast frequencies are what it learned with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from saccade.core import BadInput
from saccade.rope import DynamicNTK, Linear, Llama3, LongRoPE, YaRN
from saccade.rope.rules import Rule
from saccade.runtime.layers import narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams

_CHOSEN: Final = ("rope_scaling_type", "rope_freq_scale", "rope_freq_base")
_NAMES: Final[dict[type[Rule], str]] = {Linear: "linear", Llama3: "Llama 3", YaRN: "YaRN"}
INSIST: Final = "(--rope-scaling none to insist)"


def reaching(
    params: ContextParams, facts: ModelFacts, tokens: int
) -> tuple[ContextParams, str | None]:
    """Options that hold `tokens` tokens in context, and one sentence where text needed them to.

    An `n_ctx` that was given stays, and no more tokens than that are counted.  Scaling that was
    chosen stays too, "none" among them.  With a window and sinks positions are those inside the
    cache, so nothing is scaled while the window is inside the trained length.

    Args:
        tokens: of prompt and answer together.

    Returns:
        The options, and what was chosen or what to expect; None where there is nothing to say.
    """
    if params.n_ctx is None and tokens > facts.n_ctx_train and params.n_swa is None:
        params = replace(params, n_ctx=tokens)
    tokens = tokens if params.n_ctx is None or params.n_swa else min(tokens, params.n_ctx)
    reach = trained_reach(params, facts)
    farthest = min(tokens, longest_distance(params, facts))
    if tokens > reach and _drops_first_tokens(params, facts):
        return params, (
            f"{tokens:,} tokens are beyond the {reach:,} the model was trained for: a window keeps "
            "text together there only with the first tokens too (--sinks 4)."
        )
    if farthest <= reach or any(getattr(params, name) is not None for name in _CHOSEN):
        return params, None
    return _scaled(params, facts, farthest, reach)


def what_fits(params: ContextParams, facts: ModelFacts, tokens: int) -> str:
    """What to do where `tokens` tokens do not fit into n_ctx, as a sentence for an error."""
    limit = facts.positions.limit
    if limit is not None:
        return f"Give a shorter text: this model has a table of {limit:,} positions."
    full, reach = None in facts.windows, scaled_reach(params, facts)
    beyond = full and reach is not None and tokens > reach
    if beyond and not _can_scale(facts):
        return f"Set {_WINDOW}, or give a shorter prompt."
    scaling = f" (with rope_scaling_type='yarn' beyond {reach:,} tokens)" if beyond else ""
    return f"Raise n_ctx{scaling}, {f'set {_WINDOW}, ' if full else ''}or give a shorter prompt."


def notes_on(params: ContextParams, facts: ModelFacts) -> list[str]:
    """What to expect of a context under these options beyond the trained length.

    Raises:
        BadInput: more tokens than the model has positions for.
    """
    limit, length = facts.positions.limit, params.n_ctx or 0
    if limit is not None and length > limit:
        raise BadInput(
            f"n_ctx={length} is more than the table of {limit} positions of this model. Lower "
            f"n_ctx to {limit}."
        )
    reach = scaled_reach(params, facts)
    farthest = min(length, longest_distance(params, facts))
    if reach is None or farthest <= reach or params.n_swa is not None:
        return []
    advice = "rope_scaling_type='yarn', or n_swa with n_sinks" if _can_scale(facts) else _WINDOW
    return [
        f"n_ctx={length:,} is beyond the {reach:,} tokens that positions reach here, so text may "
        f"lose coherence past them. Set {advice}."
    ]


_WINDOW: Final = "a window with the first tokens (n_swa, n_sinks=4)"


def _can_scale(facts: ModelFacts) -> bool:
    rule = facts.positions.rule
    return rule is not None and facts.positions.refusal is None and not isinstance(rule, LongRoPE)


def trained_reach(params: ContextParams, facts: ModelFacts) -> int:
    """Tokens that positions reach without scaling by the params."""
    return params.yarn_orig_ctx or facts.positions.reach(facts.n_ctx_train)


def scaled_reach(params: ContextParams, facts: ModelFacts) -> int | None:
    """Tokens that positions reach under the params; None: without end, or not known.

    A base that was given by hand says not how far it stretches: there the trained length counts.
    """
    positions, reach = facts.positions, facts.positions.reach(facts.n_ctx_train)
    own, kind, scale = positions.rule, params.rope_scaling_type, params.rope_freq_scale
    if own is None or kind == "dynamic" or (kind is None and isinstance(own, DynamicNTK)):
        return None
    trained = params.yarn_orig_ctx or getattr(own, "original_max_position", facts.n_ctx_train)
    if kind == "none":
        return trained
    if kind is None:
        return reach if scale is None else int(reach / (scale * getattr(own, "factor", 1.0)))
    return max(trained, params.n_ctx or 0) if scale is None else int(trained / scale)


def longest_distance(params: ContextParams, facts: ModelFacts) -> int:
    """Most tokens, itself counted, to which a query's positions reach back in any layer."""
    widest = 0
    for own in facts.windows:
        window, sinks = narrowed_window(own, params)
        window = own if window is None else window + sinks
        widest = max(widest, _ENDLESS if window is None else window)
    return widest


_ENDLESS: Final = 1 << 62


def _drops_first_tokens(params: ContextParams, facts: ModelFacts) -> bool:
    """Whether layers that learned to rest on the first tokens lose them (arXiv 2309.17453)."""
    narrowed = any(own is None and narrowed_window(own, params)[0] for own in facts.windows)
    return narrowed and not params.n_sinks and not facts.learned_sinks


def _scaled(
    params: ContextParams, facts: ModelFacts, tokens: int, reach: int
) -> tuple[ContextParams, str]:
    """The params with the scaling that reaches `tokens`, or as they are, and the sentence."""
    positions = facts.positions
    beyond = f"{tokens:,} tokens are beyond the {reach:,} the model was trained for: "
    if positions.limit is not None:
        return params, beyond + (
            f"it has a table of {positions.limit:,} positions and cannot read further."
        )
    if positions.rule is None:
        return params, beyond + "it has no rotary positions to scale, and may lose coherence."
    if positions.refusal is not None or isinstance(positions.rule, LongRoPE):
        why = positions.refusal or "its LongRoPE divisors are searched for that length."
        return params, beyond + (
            f"its positions cannot be scaled ({why.rstrip('.')}), so text may lose coherence; a "
            "window with sinks keeps it (--swa 1024 --sinks 4)."
        )
    stretch = tokens / reach
    name, changed = _stretched(positions.rule, stretch, tokens, facts.n_ctx_train, params)
    return replace(params, **changed), (
        f"{beyond}positions are scaled by {name} x{stretch:.1f} {INSIST}."
    )


def _stretched(
    own: Rule, stretch: float, tokens: int, n_ctx_train: int, params: ContextParams
) -> tuple[str, dict[str, float | int | str]]:
    """Name and options of the model's own rule stretched further, or of YaRN where it has none."""
    if isinstance(own, Linear | Llama3 | YaRN) and params.yarn_orig_ctx is None:
        return _NAMES[type(own)], {"rope_freq_scale": 1.0 / (own.factor * stretch)}
    trained = params.yarn_orig_ctx or getattr(own, "original_max_position", n_ctx_train)
    yarn = {"rope_scaling_type": "yarn", "yarn_orig_ctx": trained}
    return "YaRN", {**yarn, "rope_freq_scale": trained / tokens}
