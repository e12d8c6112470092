"""`generate()` under `attach` on a CPU: steps of a few tokens through the C++ layers.

Where the decoder of an attached model is called as a step of decoding over saccade's own caches,
the C++ layers compute it (`hf.fused_decoder`); every other call (a prompt, padding, other caches,
gradients, hidden states of each layer) is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from saccade.hf.cache import SaccadeCache
from saccade.hf.decoder_layers import describe
from saccade.hf.fused_decoder import fused_decoder
from saccade.hf.runs import ModelRuns, Run, Undo
from saccade.hf.split_forward import Forward, serve_steps

HiddenOf = Callable[[Run, Tensor, SaccadeCache], Tensor | None]
"""Hidden states `[B, t, hidden]` of new tokens `[B, t]`; None: the model has to compute them."""
_READ = frozenset({"input_ids", "past_key_values", "position_ids", "attention_mask", "use_cache"})


def decode_in_kernels(undo: Undo, runs: ModelRuns) -> None:
    """Steps of decoding are computed by the C++ layers, where they know the model's class."""
    if describe(runs.model) is None:
        return
    decoder_of = lru_cache(maxsize=2)(fused_decoder)

    def hidden(run: Run, tokens: Tensor, cache: SaccadeCache) -> Tensor | None:
        decoder = decoder_of(run)
        return None if decoder is None else decoder.hidden(tokens, cache)

    serve_decoding(undo, runs, hidden)


def serve_decoding(undo: Undo, runs: ModelRuns, hidden_of: HiddenOf) -> None:
    """Until undone, `hidden_of` computes what it can of the steps over caches of the run in force.

    A run without the change named "steps" keeps the model's own.
    """

    def step(original: Forward, *args: Any, **kwargs: Any) -> Any:
        run, cache = runs.in_force, kwargs.get("past_key_values")
        if args or run is None or not isinstance(cache, SaccadeCache) or cache.run is not run:
            return original(*args, **kwargs)
        if "steps" not in run.changes or _shows_layers(run.model.config):
            return original(*args, **kwargs)
        tokens = _tokens_of_step(kwargs, cache.seen)
        hidden = None if tokens is None else hidden_of(run, tokens, cache)
        if hidden is None:
            return original(*args, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    serve_steps(undo, runs.model, step)


def _tokens_of_step(kwargs: Mapping[str, Any], seen: int) -> Tensor | None:
    """The tokens `[B, t]` of a call that asks for nothing but their hidden states."""
    tokens = kwargs.get("input_ids")
    others = [value for name, value in kwargs.items() if name not in _READ]
    if tokens is None or not seen or any(value is not None for value in others):
        return None
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if kwargs.get("use_cache") is False or not _is_all_true(mask):
        return None
    if positions is not None:
        expected = torch.arange(seen, seen + tokens.shape[1], device=positions.device)
        if not torch.equal(positions, expected.expand_as(positions)):
            return None
    return tokens


def _is_all_true(mask: Any) -> bool:
    """Whether a mask of transformers hides nothing; one of another form than `[B, n]` may."""
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))


def _shows_layers(config: Any) -> bool:
    """Whether the outputs of each layer are asked for."""
    names = ("output_hidden_states", "output_attentions")
    return any(getattr(config, name, False) for name in names)
