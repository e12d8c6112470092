"""How long a context has to be, how long it can be, and what a text that is longer is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from saccade.cli.failure import UsageError
from saccade.cli.notes import Notes
from saccade.cli.shared_options import CONTEXT, Values, idle_flags, with_flags
from saccade.units import as_bytes

if TYPE_CHECKING:
    from saccade.runtime import ContextParams, ModelFacts, Sampler

_LENGTH_OPTIONS = (
    "n_ctx", "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
    "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip


class Room:
    """How many tokens can be in context under these options; None: any number.

    Args:
        facts, params: of the model and the run.
        free: bytes of memory for caches.
    """

    def __init__(self, facts: ModelFacts, params: ContextParams, free: int) -> None:
        self._free, self._per_token = free, 0.0
        self.most: int | None = None
        if params.n_swa is not None:
            return
        self._given = params.n_ctx
        self.most = params.n_ctx
        limit = getattr(getattr(facts, "positions", None), "limit", None)
        if params.n_ctx is None and limit is not None:  # a table of positions has an end
            self._given = self.most = facts.n_ctx_train
        elif params.n_ctx is None:
            self._per_token = _bytes_per_token(facts, params)
            self.most = int(free / self._per_token) if self._per_token else None

    def check(self, tokenizer: Any, text: str, where: str, *, seen: int = 0) -> None:
        """Raise UsageError, soon, for a text that is too long; its end is not read for that."""
        if self.most is None or len(text.encode()) <= self.most - seen:
            return
        from saccade.hf.text_tokens import count_tokens

        found = count_tokens(tokenizer, text, max(0, self.most - seen))
        if found + seen > self.most:
            raise self._too_long(f"{where} has about {_rounded(found):,} tokens", seen)

    def check_tokens(self, count: int, *, seen: int = 0) -> None:
        """Raise UsageError for a prompt of so many tokens, where it does not fit."""
        if self.most is not None and count + seen > self.most:
            raise self._too_long(f"the prompt has {count:,} tokens", seen)

    def _too_long(self, what: str, seen: int) -> UsageError:
        behind = f" behind the {seen:,} of the session" if seen else ""
        if self._given is not None:
            why, first = f"--ctx-size {self._given}", "raise --ctx-size"
        else:
            per = as_bytes(self._per_token)
            why = f"{as_bytes(self._free)} of memory are free, at {per} a token"
            first = "store keys in fewer bytes (-ctk int8 -ctv int8)"
        return UsageError(
            f"{what}, but {max(0, (self.most or 0) - seen):,} fit{behind} ({why}). Give a shorter "
            f"text, {first}, or set --swa 1024 --sinks 4, which reads text of any length."
        )


def _bytes_per_token(facts: ModelFacts, params: ContextParams) -> float:
    """Bytes of caches that every further token takes."""
    from saccade.runtime.memory import cache_bytes

    few, many = 1 << 14, 1 << 15
    sizes = [cache_bytes(facts, params, [(1, 1)], reserve=count) for count in (few, many)]
    return (sizes[1] - sizes[0]) / (many - few)


def _rounded(count: int) -> int:
    return round(count, 3 - len(str(count))) if count >= 10_000 else count


def reaching(params: ContextParams, facts: ModelFacts, tokens: int, notes: Notes) -> ContextParams:
    """The options under which `tokens` tokens fit, with positions scaled where it takes that."""
    from saccade.runtime import auto_scaling

    positions: Any = getattr(facts, "positions", None)
    if params.n_ctx is None and getattr(positions, "limit", None) is not None:
        return params  # a table of positions has an end, and text stops there
    wanted = tokens if params.n_swa is not None else params.n_ctx or tokens
    found, said = auto_scaling.reaching(params, facts, wanted)
    if positions is not None:
        _note_scale_alone(params, facts, wanted, notes)
    if said:
        notes.note(with_flags(said, notes.typed))
    elif params.rope_scaling_type == "none" and params.n_swa is None and wanted > facts.n_ctx_train:
        notes.note(
            f"{wanted:,} tokens are beyond the {facts.n_ctx_train:,} the model was trained for, "
            "and --rope-scaling none insists on its own positions: text may fall apart there."
        )
    return found


def _note_scale_alone(params: ContextParams, facts: ModelFacts, tokens: int, notes: Notes) -> None:
    """Say what a factor without a kind of scaling does, and whether this text needs it."""
    scale, rule = params.rope_freq_scale, facts.positions.rule
    if params.rope_scaling_type is not None or scale in (None, 1) or rule is None:
        return
    from saccade.rope import Unscaled
    from saccade.runtime.auto_scaling import trained_reach

    how = "replaces the factor of the model's own scaling"
    if isinstance(rule, Unscaled):
        how = "stretches positions linearly, as rope_scaling_type='linear' does"
    reach = trained_reach(params, facts)
    cost = "" if tokens > reach else (
        f"; {tokens:,} tokens are inside the {reach:,} that positions reach without it, where it "
        "can only cost"
    )  # fmt: skip
    notes.note(with_flags(f"rope_freq_scale={scale:g} alone {how}{cost}.", notes.typed))


def as_saved(
    params: ContextParams, saved: Mapping[str, Any], n_ctx_train: int, notes: Notes
) -> ContextParams:
    """The options with the length and scaling of a session, where none were given.

    Keys in a session have its positions, so that it can only go on under the same scaling.
    """
    if any(getattr(params, name) is not None for name in _LENGTH_OPTIONS):
        return params
    if all(saved.get(name) in (None, "none") for name in _LENGTH_OPTIONS[1:]):
        return params if params.n_swa is not None else replace(params, n_ctx=n_ctx_train)
    taken = {name: saved.get(name) for name in _LENGTH_OPTIONS}
    scaled = ", ".join(f"{name}={value}" for name, value in taken.items() if value is not None)
    notes.note(with_flags(f"the session keeps its {scaled}.", notes.typed))
    return replace(params, **taken)


def note_without_effect(
    facts: ModelFacts, params: ContextParams, notes: Notes, device: Any = None
) -> None:
    """Say which of the options that were given change nothing for this model."""
    from saccade.runtime.no_effect import without_effect

    flags = {option.field: option.flags[0] for option in CONTEXT}
    flags |= {"rope_freq_scale": "rope_freq_scale"}  # two options set it
    for name, why in without_effect(facts, params, device=device).items():
        said = f"{flags.get(name, name)} changes nothing here: {why.rstrip('.')}."
        notes.note(with_flags(said, notes.typed))


def note_greedy(values: Values, sampler: Sampler, notes: Notes) -> None:
    """Say which options of sampling change nothing, because nothing is sampled."""
    if flags := idle_flags(values, sampler):
        verb = "changes" if len(flags) == 1 else "change"
        notes.note(
            f"{' and '.join(flags)} {verb} nothing here: at temperature 0 the most likely token "
            "is always taken."
        )


def in_force(params: ContextParams) -> dict[str, Any]:
    """The options that differ from the defaults, as JSON."""
    values = {field.name: (getattr(params, field.name), field.default) for field in fields(params)}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    if params.sparse is not None:
        changed["sparse"] = str(params.sparse)
    return changed
