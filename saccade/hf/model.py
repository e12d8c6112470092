"""A transformers model as a `runtime.Model`: tokens and caches in, hidden states out."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.cache import ShiftKeys, StateCache
from saccade.core import Unsupported
from saccade.hf.attach import make_run, new_cache, running
from saccade.hf.cache import SaccadeCache
from saccade.hf.cached_keys import key_rotations, probe_cache
from saccade.hf.deferred_rope import deferred
from saccade.hf.facts import facts_of
from saccade.hf.fused_decoder import FusedDecoder, fused_decoder
from saccade.hf.identity import model_identity
from saccade.hf.key_rotation import KeyRotation
from saccade.hf.layers import layer_kinds
from saccade.hf.policy_sources import output_weights
from saccade.hf.rope import (
    Rotary,
    first_rotary,
    frequencies_of,
    table_key,
)
from saccade.hf.rope_labels import rope_labels
from saccade.hf.rope_tables import reaching
from saccade.hf.runs import Run, activated, run_in_force
from saccade.hf.split_forward import counts_from_zero, cuttable, hidden_states, logits_of
from saccade.rope import Frequencies
from saccade.runtime.layers import without_own_dtype
from saccade.runtime.model import ModelCache, ModelFacts
from saccade.runtime.params import ContextParams


class HFModel:
    """A causal language model of transformers behind the runtime's Model protocol.

    Args:
        model: e.g. a LlamaForCausalLM.
        name: what to call it in tables.
        n_ctx_train: length it was trained for; default what its config says.
        run: the options it computes under, from `attached`; None: what is in force for the model.
        drafts: the options of its drafts; None: it drafts nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str = "",
        n_ctx_train: int | None = None,
        *,
        run: Run | None = None,
        drafts: Run | None = None,
    ) -> None:
        self.model = model
        self.run = run
        self._drafter = None if drafts is None else HFModel(model, name, n_ctx_train, run=drafts)
        self._rotations: dict[Hashable, list[KeyRotation]] = {}
        self._name = name or type(model).__name__
        self._n_ctx_train = n_ctx_train

    @property
    def facts(self) -> ModelFacts:
        """What the config says, heads as they are now (`converted_heads` changes them)."""
        return facts_of(
            self.model.config,
            name=self._name,
            n_ctx_train=self._n_ctx_train,
            dtype=self.model.dtype,
            model_class=type(self.model),
        )

    @property
    def device(self) -> torch.device:
        """Device of its caches."""
        return self.model.device

    def identity(self) -> dict[str, str]:
        """What `model_identity` says of the model, and the rotary positions in force."""
        return {**model_identity(self.model), **rope_labels(self.model, self._rotary)}

    @contextmanager
    def attached(self, params: ContextParams) -> Iterator[HFModel]:
        """The model under these params inside the `with`.

        The params count only for what is computed through the model that is given here.
        """
        run = make_run(self.model, params, serves_every_call=False)
        with ExitStack() as stack:
            stack.enter_context(running(run))
            drafts = None
            if params.n_draft is not None:
                drafts = make_run(self.model, params.of_drafts(), serves_every_call=False)
                stack.enter_context(running(drafts))
            stack.enter_context(cuttable(self.model))
            yield HFModel(self.model, self._name, self._n_ctx_train, run=run, drafts=drafts)

    def new_cache(self, params: ContextParams, *, reserve: int = 0) -> SaccadeCache:
        """Empty caches under these params, with room for `reserve` tokens at once."""
        params, run = without_own_dtype(params, self.model.dtype), self.run
        if run is None or run.params != params:
            run = make_run(self.model, params, serves_every_call=False)
        return new_cache(run, reserve=reserve, n_ctx_train=self._n_ctx_train)

    def hidden(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """Hidden states `[B, t, hidden]` of new tokens `[B, t]` that follow those in the cache."""
        assert isinstance(cache, SaccadeCache), "caches come from new_cache"
        if self._drafter is not None:
            cache.follow(self.run)
        if cache.seen and tokens.shape[1] > 1 and cache.has_states and not self._chunks:
            parts = [self._read(token, cache) for token in tokens.split(1, dim=1)]
            return torch.cat(parts, dim=1)
        return self._read(tokens, cache)

    def drafted(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """`hidden` under the pattern of drafts, which attends to the keys of the same cache."""
        assert isinstance(cache, SaccadeCache) and self._drafter is not None
        cache.follow(self._drafter.run)
        return self._drafter.hidden(tokens, cache)

    def _read(self, tokens: Tensor, cache: SaccadeCache) -> Tensor:
        """`hidden` in one call of the model."""
        return activated(self.run, lambda: reaching(cache.reaches, self._decoded, tokens, cache))

    def _decoded(self, tokens: Tensor, cache: SaccadeCache) -> Tensor:
        """`hidden` under the options and rotary tables in force."""
        fused = None if self._fused is None else self._fused.hidden(tokens, cache)
        if fused is not None:
            return fused
        before, count, model = cache.seen, tokens.shape[1], self.model
        options: dict[str, Any] = {"input_ids": tokens.to(model.device)}
        options |= {"past_key_values": cache, "use_cache": True}
        if cache.cursor is not None or self._counts_from_zero:
            start = before if cache.cursor is None else cache.cursor.start[:, None]
            options["position_ids"] = start + torch.arange(count, device=model.device)[None]
        try:
            if self.run is not None and self.run.fused:
                hidden = deferred(hidden_states, model, **options)
            else:
                hidden = hidden_states(model, **options)
        except ValueError as error:
            if type(cache).__name__ not in str(error):
                raise
            raise Unsupported(
                f"{type(model).__name__} takes no other cache than one of its own class, so it "
                "cannot read on from saccade's. Use the model as transformers runs it."
            ) from error
        if cache.cursor is None:
            _check_stored(model, cache, before + count)
        return hidden

    def _probe(self) -> SaccadeCache:
        """An empty cache of all keys, to see what the model does with a few tokens."""
        return probe_cache(self.model, self.run)

    @cached_property
    def _fused(self) -> FusedDecoder | None:
        """What computes a few tokens on a CPU, under the options of a run."""
        return None if self.run is None else fused_decoder(self.run)

    @cached_property
    def _counts_from_zero(self) -> bool:
        return counts_from_zero(self.model)

    @cached_property
    def _rebuilds_keys(self) -> bool:
        """Whether the model computes with what it caches itself, instead of only attending."""
        cache = self._probe()
        self._read(torch.ones(1, 1, dtype=torch.int64), cache)
        return cache.rebuilt

    @cached_property
    def _chunks(self) -> bool:
        """Whether recurrent layers go on from their states when several tokens are read at once.

        Some of transformers do so for a single token only, and begin anew for more.
        """
        found: list[Tensor] = []
        tokens = torch.arange(2, device=self.model.device)[None]
        for changed in (False, True):
            cache = self._probe()
            self._read(tokens, cache)
            if changed:
                cache.disturb_states()
            found.append(self._read(tokens, cache))
        return not torch.equal(*found)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` of hidden states `[..., hidden]`."""
        flat = hidden.reshape(1, -1, hidden.shape[-1])
        logits = None if self._fused is None else activated(self.run, self._fused.logits, flat[0])
        logits = activated(self.run, logits_of, self.model, flat) if logits is None else logits
        return logits.reshape(*hidden.shape[:-1], logits.shape[-1])

    def table_key(self, length: int) -> Hashable:
        """Equal for two lengths of a text that have the same rotary tables."""
        return table_key(self._rotary.values(), length)

    def shift_keys(self, layer: int, length: int | None = None) -> ShiftKeys:
        """The function that moves cached keys of a layer; see `hf.key_rotation`.

        Args:
            length: of the text whose rotary tables the keys have; default the trained one.

        Raises:
            Unsupported: cached keys that are no rotated keys, or layers with recurrent states.
        """
        self._check_keys_are_rotated()
        length = self.facts.n_ctx_train if length is None else length
        key = self.table_key(length)
        if key not in self._rotations:
            self._rotations[key] = key_rotations(self.model, self.run, length)
        return self._rotations[key][layer]

    def output_weights(self, layer: int) -> Tensor:
        """The output projection of a layer, `[H, Dv, hidden]`; see `hf.policy_sources`."""
        return output_weights(self.model, layer)

    def _check_keys_are_rotated(self) -> None:
        if any(kind.states for kind in layer_kinds(self.model.config)):
            what = "recurrent states"
        elif self._rebuilds_keys:
            what = "what it computes keys from"
        else:
            return
        raise Unsupported(
            f"context shift re-rotates cached keys, but {type(self.model).__name__} caches "
            f"{what}. Leave n_keep unset for this model."
        )

    @property
    def _rotary(self) -> Mapping[nn.Module, Rotary]:
        """What computes cos and sin in place of the model's rotary modules."""
        run = self.run or run_in_force(self.model)
        return {} if run is None else run.rotary


def rotary_frequencies(model: PreTrainedModel, layer_type: str | None = None) -> Frequencies:
    """The rotary frequencies that a call of the model uses now, float64 on the CPU.

    Args:
        layer_type: for models whose layer types have frequencies of their own.

    Raises:
        Unsupported: a model without rotary modules.
    """
    run = run_in_force(model)
    return frequencies_of(first_rotary(model, {} if run is None else run.rotary), layer_type)


def _check_stored(model: PreTrainedModel, cache: SaccadeCache, expected: int) -> None:
    """Raise Unsupported where a layer did not give what it keeps to the cache that was passed."""
    for index, store in enumerate(cache.stores):
        kept = store.seen
        if isinstance(store, StateCache) and not store.state().tensors:
            kept = 0
        if kept != expected:
            raise Unsupported(
                f"layer {index} of {type(model).__name__} gave {kept} of {expected} tokens to the "
                "cache it was called with and keeps the others elsewhere, where a Context cannot "
                "find them. Use the model as transformers runs it."
            )
