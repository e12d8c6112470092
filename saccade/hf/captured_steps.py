"""`generate()` under `attach` on a GPU: steps of decoding are captured CUDA graphs.

A step of transformers is a thousand launches from Python, which take longer than the GPU needs to
read the weights.  Where the decoder of an attached model is called for one more token in every row
over saccade's own caches, a `DecodeStep` computes it, by the fused kernels that a Context uses.
Every other call is the model's own: a prompt, padded rows, caches that need the host for each token
(pages), sparse patterns over quantized keys.  A warning says once why.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Final
from weakref import proxy, ref

import torch
from torch import Tensor

from saccade.core import Unsupported
from saccade.hf import changes
from saccade.hf.cache import SaccadeCache
from saccade.hf.deferred_rope import deferred
from saccade.hf.fused_forward import serve_decoding
from saccade.hf.rope_tables import reaching
from saccade.hf.runs import ModelRuns, Run, Undo, activated
from saccade.hf.split_forward import hidden_states
from saccade.runtime.step import DecodeStep, captures, refusal

_SHARED: Final = ("attention", "rotary")
"""Changes of the model that a step needs too."""
_FREE_CAPTURES: Final = 4
_STEPS_A_CAPTURE: Final = 16
"""A capture costs as much as several steps run eagerly."""


def decode_in_graphs(undo: Undo, runs: ModelRuns) -> None:
    """Steps of decoding over saccade's caches are captured graphs, where they can be."""
    steps: dict[Run, _Steps] = {}

    def hidden(run: Run, tokens: Tensor, cache: SaccadeCache) -> Tensor | None:
        if tokens.shape[1] != 1 or torch.is_grad_enabled() or cache.observer is not None:
            return None
        if run not in steps:
            steps[run] = _Steps(undo, runs, run)
        return steps[run].hidden(tokens, cache)

    serve_decoding(undo, runs, hidden)


class _Steps:
    """The captured steps of one run, over one cache at a time."""

    def __init__(self, undo: Undo, runs: ModelRuns, run: Run) -> None:
        # The same options with fused kernels, in force inside of steps alone.
        needed = {name: run.changes[name] for name in _SHARED if name in run.changes}
        needed["layers"] = changes.fuse_layers
        inner = replace(run, fused=True, serves_every_call=False, changes=needed)
        runs.begin_within(undo, inner)
        self._model: Any = _Hidden(inner)
        self._refusal = None if captures(run.params) else "these options need the host"
        self._cache: ref[SaccadeCache] | None = None
        self._step: DecodeStep | None = None
        self._warned = False

    def hidden(self, tokens: Tensor, cache: SaccadeCache) -> Tensor | None:
        """Hidden states `[B, 1, hidden]` of one token in each row; None: the model has to do it."""
        reason = self._refusal or refusal(cache)
        if reason is None:
            try:
                return self._taken(tokens, cache)
            except Unsupported as error:
                reason = self._refusal = str(error)
        if not self._warned:
            warnings.warn(f"steps of generate() are not captured: {reason}", stacklevel=2)
        self._warned = True
        return None

    def _taken(self, tokens: Tensor, cache: SaccadeCache) -> Tensor:
        step, known = self._step, None if self._cache is None else self._cache()
        if step is None or known is not cache or step.batch != tokens.shape[0]:
            # A step holds the storage of its cache, so it is forgotten where the cache is.
            step = DecodeStep(self._model, proxy(cache), batch=tokens.shape[0], inference=False)
            self._cache, self._step = ref(cache, self._forget), step
        if step.captures > _FREE_CAPTURES + step.steps // _STEPS_A_CAPTURE:
            raise Unsupported("the storage of this cache moves too often.")
        return step(tokens[:, 0])[:, None].to(self._model.dtype)

    def _forget(self, _: ref[SaccadeCache]) -> None:
        self._step = self._cache = None


class _Hidden:
    """A model under the options of a run, whose logits are its hidden states."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.device, self.dtype = run.model.device, run.model.dtype

    def hidden(self, tokens: Tensor, cache: SaccadeCache) -> Tensor:
        """Hidden states `[B, 1, hidden]` at the cursor of the cache."""
        assert cache.cursor is not None, "a step has set it"
        inputs = {"input_ids": tokens, "position_ids": cache.cursor.start[:, None]}

        def decoded() -> Tensor:
            return hidden_states(self._run.model, **inputs, past_key_values=cache, use_cache=True)

        return activated(self._run, lambda: reaching(cache.reaches, lambda: deferred(decoded)))

    def logits(self, hidden: Tensor) -> Tensor:
        """The hidden states themselves."""
        return hidden
