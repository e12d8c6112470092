"""Options that change nothing for a model, so that no one measures or waits for them.

Nothing is looked up by the name of a model or of an option.  What an option changes is the cache of
a layer, the window and sinks of a layer, or its rotary frequencies: all of these are made once with
the option and once without it, and compared.  An option that one layer of many reacts to has an
effect.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from saccade.cache import SlidingCache, StagingBuffers
from saccade.compress import in_keys, resolve_budget
from saccade.core import DenseKV
from saccade.rope import DynamicNTK, Linear, NTKAware, Rule, Unscaled, YaRN, inverse_frequencies
from saccade.runtime.budgets import budget_in_keys
from saccade.runtime.layers import layer_cache, narrowed_window
from saccade.runtime.model import ModelFacts
from saccade.runtime.params import ContextParams
from saccade.sparse import Pattern, PromptPattern, followed_by
from saccade.units import Bytes


def without_effect(
    facts: ModelFacts, params: ContextParams, *, device: torch.device | str | None = None
) -> dict[str, str]:
    """{field of ContextParams that was set: one clause why it changes nothing for this model}.

    Args:
        device: where the model runs, None where that is not known.
    """
    case = _Case(facts, params, None if device is None else torch.device(device))
    given = [f.name for f in fields(params) if _is_set(params, f.name) and f.name in _REASONS]
    found = ((name, _REASONS[name](case)) for name in given)
    return {name: reason for name, reason in found if reason is not None}


def no_fewer_heads(facts: ModelFacts, num_kv_heads: int) -> str | None:
    """Why a conversion to so many KV heads changes nothing, or None."""
    most = max((heads for heads, _, _ in facts.kv_shapes), default=facts.num_kv_heads)
    if num_kv_heads < most:
        return None
    return f"the model has {_count(most, 'KV head')} already"


@dataclass(frozen=True, slots=True)
class _Case:
    """A model under options.

    Attributes:
        device: None where it is not known.
    """

    facts: ModelFacts
    params: ContextParams
    device: torch.device | None

    def without(self, *names: str) -> ContextParams:
        """The params with the defaults of some fields."""
        return replace(self.params, **{name: _default(name) for name in names})

    @property
    def length(self) -> int:
        """Tokens that the context may hold."""
        return self.params.n_ctx or self.facts.n_ctx_train

    @property
    def windows(self) -> set[int | None]:
        """Every window that a layer of the model has of its own."""
        return set(self.facts.windows)

    def caches(self, params: ContextParams) -> list[Hashable]:
        """What identifies the caches that layers of every kind get."""
        return [_made(own, params, self.facts.dtype) for own in self.windows]

    def same_caches(self, *names: str) -> bool:
        """Whether these options change no cache."""
        return self.caches(self.params) == self.caches(self.without(*names))


def _made(own: int | None, params: ContextParams, dtype: torch.dtype) -> Hashable:
    """Class and settings of the cache of a layer; keys kept in the model's dtype as that dtype."""
    staging = None if params.offload_kqv else StagingBuffers()
    cache = layer_cache(own, params, staging=staging)
    settings = {**cache.state().settings}
    settings["dtype"] = settings.get("dtype") or str(dtype).removeprefix("torch.")
    checkpoints = cache.most_checkpoints if isinstance(cache, SlidingCache) else 0
    return type(cache), tuple(sorted(settings.items())), checkpoints


def _default(name: str) -> Any:
    spec = ContextParams.__dataclass_fields__[name]
    return None if spec.default is MISSING else spec.default


def _is_set(params: ContextParams, name: str) -> bool:
    value, usual = getattr(params, name), _default(name)
    return type(value) is not type(usual) or value != usual


def _storage(case: _Case) -> str | None:
    """Of type_k and type_v, which go together."""
    if not case.same_caches("type_k", "type_v"):
        return None
    if all(window is not None for window in case.windows):
        return _all_slide(case, "keeps so narrow a window in the model's dtype")
    return f"the model's keys are {str(case.facts.dtype).removeprefix('torch.')} already"


def _all_slide(case: _Case, what: str) -> str:
    widths = sorted({window for window in case.windows if window is not None})
    widest = f"{widths[0]:,}" if len(widths) == 1 else f"at most {widths[-1]:,}"
    return f"every layer slides over {widest} tokens already and {what}"


def _pages(case: _Case) -> str | None:
    if case.same_caches("page_size"):
        return _all_slide(case, "keeps them in a ring, not in pages")
    return None


def _offload(case: _Case) -> str | None:
    if case.same_caches("offload_kqv"):
        return "every layer keeps its window in a ring, which stays where the model computes"
    if case.device is not None and case.device.type == "cpu":
        return "the model computes on the CPU, whose memory the caches are in anyway"
    return None


def _window(case: _Case) -> str | None:
    params = case.params
    if not any(narrowed_window(own, params)[0] for own in case.windows):
        return _all_slide(case, f"n_swa={params.n_swa:,} is no narrower")
    return _holds_all(case)


def _holds_all(case: _Case) -> str | None:
    """A window as long as the whole context hides nothing."""
    n_ctx, window = case.params.n_ctx, case.params.n_swa
    if n_ctx is None or window is None or n_ctx > window:
        return None
    return f"the window of {window:,} tokens holds all of n_ctx={n_ctx:,}"


def _sinks(case: _Case) -> str | None:
    if not any(narrowed_window(own, case.params)[1] for own in case.windows):
        return "no layer is full attention in this model, and only those are given sinks"
    return _holds_all(case)


def _checkpoints(case: _Case) -> str | None:
    if case.facts.state_bytes or not case.same_caches("ctx_checkpoints"):
        return None
    return "no layer has a window or a recurrent state, so any position can be gone back to"


def _keep(case: _Case) -> str | None:
    if case.params.n_swa is None:
        return None
    return "a context under n_swa is never full, so it is never shifted"


def _sparse(case: _Case) -> str | None:
    pattern = case.params.sparse
    assert pattern is not None
    if None not in case.windows:
        return _all_slide(case, "is sparse by that; patterns are for full attention")
    layers = case.facts.num_layers
    if isinstance(pattern, PromptPattern) and pattern.first_layer(layers) >= layers:
        return f"its dense_layers are all {layers} layers of this model"
    longest = case.length if case.params.n_swa is None else min(case.length, case.params.n_swa)
    if _covers(pattern, longest):
        return f"its blocks cover all of {longest:,} tokens"
    return None


def _covers(pattern: Pattern, length: int) -> bool:
    """Whether the last queries of a text, which have most keys to choose from, read all blocks.

    A pattern for prompts is asked as in the middle of one, for as few queries as it selects for.
    """
    count = pattern.least_queries if isinstance(pattern, PromptPattern) else 1
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, length, 8, generator=generator)
    for last in {length, (length + 1) // 2}:
        view = DenseKV(k[:, :, :last], k[:, :, :last])
        q = torch.randn(1, 1, min(count, last), 8, generator=generator)
        try:
            allowed = followed_by(length, pattern.select, q, view, last - q.shape[2]).allowed
        except (ValueError, TypeError, RuntimeError):
            return False  # a pattern for other shapes: it is measured instead
        if not bool(allowed.all()):
            return False
    return True


def _policy(case: _Case) -> str | None:
    """Of kv_policy and kv_budget, which go together; rings are never compressed."""
    made = (layer_cache(own, case.params) for own in case.windows)
    if all(isinstance(cache, SlidingCache) for cache in made):
        return "every layer keeps only a window, which no policy makes smaller"
    budget, found = case.params.kv_budget, budget_in_keys(case.params, case.facts).kv_budget
    assert budget is not None and found is not None
    if resolve_budget(in_keys(found), case.length) < case.length:
        return None
    said = str(budget) if isinstance(budget, Bytes) else f"{budget:g}"
    return f"a budget of {said} keeps all of {case.length:,} tokens"


def _flash(case: _Case) -> str | None:
    if case.params.backend is None:
        return None
    return f"backend={case.params.backend!r} already says what computes attention"


def _rope(case: _Case, name: str) -> str | None:
    """Of one option of rotary positions: frequencies with it and without it.

    "none" always says something: that nothing is to be chosen beyond the trained length.
    """
    positions = case.facts.positions
    if positions.rule is None:
        return "the model has no rotary positions"
    if positions.base is None or getattr(case.params, name) == "none":
        return None
    kind, chosen = case.params.rope_scaling_type, (case.params.n_ctx, case.params.rope_freq_scale)
    if kind is not None and chosen == (None, None):
        return None  # nothing says how far: it is refused
    given = _frequencies(case, case.params)
    usual = _frequencies(case, case.without(name))
    if given is None or usual is None or not torch.allclose(given, usual, rtol=1e-12, atol=0):
        return None
    return f"positions up to {case.length:,} tokens are the same without it"


def _frequencies(case: _Case, params: ContextParams) -> Tensor | None:
    """Frequencies and their magnitude; None where only the model's own code can tell."""
    positions = case.facts.positions
    assert positions.rule is not None and positions.base is not None
    rule = _changed_rule(case, params, positions.rule)
    if rule is None or isinstance(rule, DynamicNTK):
        return None
    base = float(params.rope_freq_base or positions.base)
    inv_freq, magnitude = inverse_frequencies(
        rule, base=base, rotary_dim=_ROTATED, seq_len=case.length
    )
    return torch.cat((inv_freq, inv_freq.new_tensor([magnitude])))


_ROTATED: Final = 64
"""Rotated dimensions of a head for the comparison of two rules."""


def _changed_rule(case: _Case, params: ContextParams, own: Rule) -> Rule | None:
    """The rule under the params; None where only the model's own code can tell."""
    if params.rope_scaling_type == "none":
        return Unscaled()
    if params.rope_scaling_type is None and params.rope_freq_scale is None:
        return own if not any(_is_set(params, name) for name in _YARN) else None
    if not isinstance(own, Unscaled):
        return None
    trained = params.yarn_orig_ctx or case.facts.n_ctx_train
    factor = max(1.0, case.length / trained)
    if params.rope_freq_scale is not None:
        factor = 1.0 / params.rope_freq_scale
    kind = params.rope_scaling_type or "linear"
    if kind == "yarn":
        given = {_YARN[n]: getattr(params, n) for n in _YARN if _is_set(params, n)}
        return YaRN(factor=factor, original_max_position=trained, **given)
    if kind == "dynamic":
        return DynamicNTK(factor=factor, original_max_position=trained)
    return NTKAware(factor=factor) if kind == "ntk" else Linear(factor=factor)


_YARN: Final = {
    "yarn_ext_factor": "ext_factor",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_ROPE: Final = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_orig_ctx", *_YARN)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


_REASONS: Final[dict[str, Callable[[_Case], str | None]]] = {
    "type_k": _storage,
    "type_v": _storage,
    "page_size": _pages,
    "offload_kqv": _offload,
    "n_swa": _window,
    "n_sinks": _sinks,
    "ctx_checkpoints": _checkpoints,
    "n_keep": _keep,
    "sparse": _sparse,
    "kv_policy": _policy,
    "kv_budget": _policy,
    "flash_attn": _flash,
    **{name: partial(_rope, name=name) for name in _ROPE},
}
"""What asks whether an option has an effect.  n_ctx, n_batch, backend and fused_layers always say
how much is read or which code runs."""
