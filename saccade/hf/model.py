"""A transformers model as a `runtime.Model`: tokens and caches in, hidden states out."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from saccade.cache import DenseCache, RingCache, ShiftKeys
from saccade.core import Unsupported
from saccade.core.kv import dense
from saccade.hf.attach import make_run, new_cache, running
from saccade.hf.cache import SaccadeCache
from saccade.hf.deferred_rope import deferred
from saccade.hf.key_rotation import Cached, KeyRotation, find_rotations
from saccade.hf.layers import layer_windows, text_config
from saccade.hf.rope import (
    Rotary,
    distinct_frequencies,
    first_rotary,
    frequencies_of,
    rotary_tables,
    table_key,
)
from saccade.hf.rope_labels import rope_labels
from saccade.hf.rope_tables import reaching
from saccade.hf.runs import Run, activated, run_in_force
from saccade.rope import Frequencies
from saccade.runtime.model import ModelCache, ModelFacts
from saccade.runtime.params import ContextParams

SAMPLES = 64
"""Numbers of each weight that go into the fingerprint of a model."""


class HFModel:
    """A causal language model of transformers behind the runtime's Model protocol.

    Args:
        model: e.g. a LlamaForCausalLM.
        name: what to call it in tables.
        n_ctx_train: length it was trained for; default what its config says.
        run: the options it computes under, from `attached`; None: what is in force for the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        name: str = "",
        n_ctx_train: int | None = None,
        *,
        run: Run | None = None,
    ) -> None:
        self.model = model
        self.run = run
        self._rotations: dict[Hashable, list[KeyRotation]] = {}
        self._name = name or type(model).__name__
        self._n_ctx_train = n_ctx_train

    @property
    def facts(self) -> ModelFacts:
        """What the config says, heads as they are now (`pool_to_mqa` changes them)."""
        return facts_of(
            self.model.config,
            name=self._name,
            n_ctx_train=self._n_ctx_train,
            dtype=self.model.dtype,
        )

    @property
    def device(self) -> torch.device:
        """Device of its caches."""
        return self.model.device

    def identity(self) -> dict[str, str]:
        """A fingerprint of the weights (a sample of each) and the rotary positions in force."""
        positions = rope_labels(self.model, self._rotary)
        return {"weights": weights_fingerprint(self.model), **positions}

    @contextmanager
    def attached(self, params: ContextParams) -> Iterator[HFModel]:
        """The model under these params inside the `with`.

        The params count only for what is computed through the model that is given here.
        """
        run = make_run(self.model, params, serves_every_call=False)
        with running(run):
            yield HFModel(self.model, self._name, self._n_ctx_train, run=run)

    def new_cache(self, params: ContextParams, *, reserve: int = 0) -> SaccadeCache:
        """Empty caches under these params, with room for `reserve` tokens at once."""
        run = self.run
        if run is None or run.params != params:
            run = make_run(self.model, params, serves_every_call=False)
        return new_cache(run, reserve=reserve)

    def hidden(self, tokens: Tensor, cache: ModelCache) -> Tensor:
        """Hidden states `[B, t, hidden]` of new tokens `[B, t]` that follow those in the cache."""
        assert isinstance(cache, SaccadeCache), "caches come from new_cache"
        decoder = self.model.get_decoder()
        tokens, options = tokens.to(self.model.device), {}
        with ExitStack() as stack:
            stack.enter_context(activated(self.run))
            stack.enter_context(reaching(cache.reaches))
            if cache.cursor is not None:
                steps = torch.arange(tokens.shape[1], device=tokens.device)
                options["position_ids"] = cache.cursor.start[:, None] + steps
            if self.run is not None and self.run.fused:
                stack.enter_context(deferred())
            output = decoder(
                input_ids=tokens,
                past_key_values=cache,
                use_cache=True,
                **options,
            )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `[..., vocab]` of hidden states `[..., hidden]`."""
        matrix = self.model.get_output_embeddings()
        if matrix is None:
            raise Unsupported(
                f"{type(self.model).__name__} has no output matrix: load a causal language model "
                "(AutoModelForCausalLM)."
            )
        with activated(self.run):
            return _finished(matrix(hidden), text_config(self.model))

    def table_key(self, length: int) -> Hashable:
        """Equal for two lengths of a text that have the same rotary tables."""
        return table_key(self._rotary.values(), length)

    def shift_keys(self, layer: int, length: int | None = None) -> ShiftKeys:
        """The function that moves cached keys of a layer; see `hf.key_rotation`.

        Args:
            length: of the text whose rotary tables the keys have; default the trained one.
        """
        length = self.facts.n_ctx_train if length is None else length
        key = self.table_key(length)
        if key not in self._rotations:
            self._rotations[key] = self._find_rotations(length)
        return self._rotations[key][layer]

    @torch.inference_mode()
    def _find_rotations(self, length: int) -> list[KeyRotation]:
        with reaching(length), activated(self.run):
            return find_rotations(
                self._read_keys,
                distinct_frequencies(rotary_tables(self.model, self._rotary, length)),
                vocab_size=self.facts.vocab_size,
                longest=self.facts.n_ctx_train,
            )

    def _read_keys(self, tokens: Tensor, positions: Tensor | None) -> list[Cached]:
        """What each layer caches of these tokens, in a cache of its own."""
        plain = ContextParams()
        run = self.run or run_in_force(self.model)
        run = make_run(self.model, plain, serves_every_call=False) if run is None else run
        cache = new_cache(replace(run, params=plain))
        where = {} if positions is None else {"position_ids": positions.to(self.device)}
        self.model.get_decoder()(
            input_ids=tokens.to(self.device), past_key_values=cache, use_cache=True, **where
        )
        stores = [s for s in cache.stores if isinstance(s, DenseCache | RingCache)]
        views = [dense(store.view()) for store in stores]
        return [Cached(view.k, view.v) for view in views]

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


def facts_of(
    model_config: PreTrainedConfig, *, name: str, n_ctx_train: int | None, dtype: torch.dtype
) -> ModelFacts:
    """What a config says of a model that need not be loaded; its trained length unless given.

    Raises:
        Unsupported: layers that our caches do not serve.
    """
    config = text_config(model_config)
    head_dim = getattr(config, "head_dim", None)
    kv_heads = getattr(config, "num_key_value_heads", None)
    return ModelFacts(
        name=name,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=kv_heads or config.num_attention_heads,
        head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        n_ctx_train=n_ctx_train or config.max_position_embeddings,
        dtype=dtype,
        windows=layer_windows(config),
        softcap=getattr(config, "attn_logit_softcapping", None),
        learned_sinks=config.model_type == "gpt_oss",
    )


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 of names, shapes and evenly spaced numbers of all weights: a sample, so it is fast.

    It tells models and fine-tunes apart, not a model whose few numbers were edited by hand.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().reshape(-1)
        at = torch.linspace(0, max(0, len(flat) - 1), SAMPLES, dtype=torch.float64).long()
        sample = flat[at.to(flat.device)].float().cpu() if len(flat) else flat.float().cpu()
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _finished(logits: Tensor, config: Any) -> Tensor:
    """What some families do to logits behind the output matrix."""
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    if cap is not None:
        logits = (logits / cap).tanh() * cap
    scale = getattr(config, "logit_scale", None)  # Cohere multiplies
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)  # Granite divides
    return logits if divisor is None else logits / divisor
