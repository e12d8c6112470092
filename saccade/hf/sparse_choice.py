"""Which sparse pattern pays for a model and a text on this device: measured, then chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from saccade.core import Unsupported
from saccade.hf.context import as_model
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.runtime import ContextParams
from saccade.sparse.choice import Choice, candidates, choose
from saccade.sparse.probe import Probe

CHUNK: Final = 512
SHORTEST: Final = 1024
LONGEST: Final = 16_384
"""Tokens of the text that are read: what a pattern pays grows with the length."""

MEASURED_LAYERS: Final = 6


def choose_sparse(
    model: HFModel | LoadedModel,
    tokens: Sequence[int] | Tensor,
    params: ContextParams | None = None,
    *,
    recall: float = 0.95,
) -> Choice:
    """Dense attention, or the fastest pattern that keeps the recall on this model, text and device.

    The model reads up to 16,384 tokens once, densely, in chunks; at doubling lengths a few layers
    measure each candidate on their own queries and keys: the share of the softmax weights that it
    keeps, and the time of selecting and attending by the time of dense attention.

    Args:
        tokens: of a text like those to come, 1-D; fewer than 1,024 are read densely.
        params: options of the run; their `sparse` is what is chosen, so it must be unset.
        recall: the least share of the attention's weight that a pattern has to keep, in (0, 1].

    Raises:
        ValueError: a recall out of range, or params with `sparse`.
        Unsupported: params with a window or a policy; a model that scales its scores otherwise.
    """
    if isinstance(recall, bool) or not 0 < recall <= 1:
        raise ValueError(f"recall is a share of the attention, in (0, 1], got {recall!r}.")
    params = params or ContextParams()
    check_params(params)
    text = whole_chunks(tokens)
    if len(text) < SHORTEST:
        why = f"dense: the text has fewer than {SHORTEST:,} tokens, which no pattern makes faster."
        return Choice(None, why, {})
    hf = as_model(model)
    assert isinstance(hf, HFModel)
    check_scores(hf)
    return choose(_measured(hf, text, params), recall)


def whole_chunks(tokens: Sequence[int] | Tensor) -> Tensor:
    """The part of a text that is read to measure it, int64 `[n]`."""
    text = torch.as_tensor(tokens, dtype=torch.int64).reshape(-1)[:LONGEST]
    return text[: len(text) // CHUNK * CHUNK]


def check_params(params: ContextParams) -> None:
    """Raise ValueError or Unsupported for options beside which no pattern can be chosen."""
    if params.sparse is not None:
        raise ValueError(
            f"params.sparse is what is chosen here, but it is {params.sparse!r}. Leave it out."
        )
    if params.n_swa is not None or params.kv_policy is not None:
        raise Unsupported(
            "a sparse pattern is chosen for attention over all keys, but n_swa or kv_policy "
            "removes some. Leave those out."
        )


def check_scores(model: HFModel) -> None:
    """Raise Unsupported unless scores are q . k / sqrt(head_dim), as selections take them."""
    facts, modules = model.facts, model.model.modules()
    own = {float(x) for m in modules if isinstance(x := getattr(m, "scaling", None), float)}
    usual = facts.head_dim**-0.5
    if facts.softcap is not None or any(abs(x - usual) > 1e-6 * usual for x in own):
        raise Unsupported(
            "a pattern is chosen for scores divided by sqrt(head_dim), which this model scales or "
            "caps otherwise. Name a pattern."
        )


def _measured(model: HFModel, text: Tensor, params: ContextParams) -> Probe:
    every = max(1, len(model.facts.windows) // MEASURED_LAYERS)
    block = 128 if model.device.type == "cuda" else 64  # what the fastest kernels take
    probe = Probe(candidates(len(text), block), every=every)
    probed: Any = replace(params, sparse=probe, n_batch=CHUNK)
    with torch.inference_mode(), model.attached(probed) as attached:
        cache, mark = attached.new_cache(probed, reserve=len(text)), SHORTEST
        for chunk in text.to(model.device).split(CHUNK):
            stop = cache.seen + CHUNK
            probe.listen(stop >= mark or stop == len(text))
            mark = mark * 2 if stop >= mark else mark
            attached.hidden(chunk[None], cache)
    return probe
