"""Speed of a run: seconds until the first token, and tokens a second after it.

Reading a prompt takes, in each layer and for each chunk, its products, its norms and activations,
and attention to all earlier keys that the window leaves; a step of decoding reads all weights and
keys once.  What calling PyTorch costs comes on top.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from saccade.advice.calls import Calls
from saccade.advice.costs import AttentionCosts, Costs
from saccade.compress import in_keys, resolve_budget
from saccade.runtime.budgets import budget_in_keys
from saccade.runtime.layers import narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.runtime.plan_blueprint import Blueprint

STATES_MOVED, INNER_MOVED = 24, 8
"""How often norms, rotations and additions pass over hidden states, an activation over the MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a user waits for.

    Attributes:
        first_token: seconds to read the prompt and choose a token.
        tokens_per_second: of the tokens after it.
    """

    first_token: float
    tokens_per_second: float


def speed_of(
    blueprint: Blueprint,
    params: ContextParams,
    tokens: int,
    costs: Costs,
    attention: Callable[[ModelFacts], AttentionCosts],
    calls: Calls,
) -> Speed:
    """Speed of a prompt of `tokens` tokens and of the tokens behind it, on a CPU.

    Args:
        attention: costs of one layer of these facts under the same params.
        calls: what Python takes beside them.
    """
    facts, size = blueprint.facts, blueprint.facts.dtype.itemsize
    params = budget_in_keys(params, facts)
    chunks = -(-tokens // params.n_batch)
    moved = (STATES_MOVED * blueprint.hidden + INNER_MOVED * blueprint.inner) * size
    token = 2 * blueprint.layers * costs.flop + facts.num_layers * moved * costs.elementwise
    called = (facts.num_layers * calls.layer + calls.model) * costs.op
    reading, step = tokens * token + chunks * called, called
    for layer, count in facts.alike():
        found = attention(layer)
        reading += count * read_seconds(found, params, layer.windows[0], tokens)
        step += count * (found.step + kept_keys(params, layer.windows[0], tokens) * found.step_key)
    head = blueprint.head * costs.head
    step += blueprint.layers * costs.weight + head
    return Speed(first_token=reading + head, tokens_per_second=1 / step)


def read_seconds(
    costs: AttentionCosts, params: ContextParams, own: int | None, tokens: int
) -> float:
    """Seconds of one layer's attention over all chunks of a prompt."""
    chunk = params.n_batch
    whole, rest = divmod(tokens, chunk)
    reach = visible(params, own)
    seconds = 0.0
    for index in range(whole + bool(rest)):
        share = 1.0 if index < whole else rest / chunk
        before = index * chunk if reach is None else min(index * chunk, reach)
        seconds += share * (costs.chunk + before * costs.chunk_key)
    return seconds


def visible(params: ContextParams, own: int | None) -> int | None:
    """Keys that a query of a layer attends to, None for all."""
    window, sinks = narrowed_window(own, params)
    return own if window is None else window + sinks


def kept_keys(params: ContextParams, own: int | None, tokens: int) -> int:
    """Keys that a step behind the prompt reads in a layer."""
    reach = visible(params, own)
    kept = tokens if reach is None else min(tokens, reach)
    if params.kv_budget is None or own is not None:
        return kept
    return min(kept, resolve_budget(in_keys(params.kv_budget), tokens))
