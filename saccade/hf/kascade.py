"""Calibrating Kascade to a model: which layers choose blocks for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from saccade.core import BadInput
from saccade.hf.context import as_model
from saccade.hf.kascade_identity import identity
from saccade.hf.layers import layer_kinds
from saccade.hf.load import LoadedModel
from saccade.hf.model import HFModel
from saccade.hf.sparse_choice import CHUNK, SHORTEST, check_params, check_scores, whole_chunks
from saccade.runtime import ContextParams
from saccade.sparse import Kascade, KascadePlan
from saccade.sparse.calibration import Calibration, best_reuse

LAYERS_OF_AN_ANCHOR: Final = 6
"""Of default: Llama-3.1-8B's 32 layers have five anchors in the paper."""
_BLOCKS_OF_A_CHOICE: Final = 8


def calibrate_kascade(
    model: HFModel | LoadedModel,
    tokens: Sequence[int] | Tensor,
    params: ContextParams | None = None,
    *,
    pattern: Kascade | None = None,
    anchors: int | None = None,
) -> KascadePlan:
    """The plan of Kascade for a model: its anchors, and whose blocks each KV head reads.

    The model reads up to 16,384 tokens once, densely, in chunks.  In the second half of them some
    queries of every layer note the softmax weights of all blocks; the anchors are those with which
    the layers keep most of their weights.

    Args:
        tokens: of a text like those to come, 1-D, 1,024 or more.
        params: options of the run; `sparse` must be unset.
        pattern: whose blocks are measured; default `Kascade()`.  In a short text fewer: an eighth.
        anchors: layers that choose; default one of six.

    Raises:
        ValueError: a number of anchors below 1, or params with `sparse`.
        BadInput: a text that is too short.
        Unsupported: params with a window or a policy; a model that scales its scores otherwise; one
            without two layers of full attention.
    """
    params, pattern = params or ContextParams(), replace(pattern or Kascade(), plan=None)
    check_params(params)
    text = whole_chunks(tokens)
    if len(text) < SHORTEST:
        raise BadInput(
            f"Kascade is calibrated on a text of {SHORTEST:,} tokens or more, got {len(tokens):,}. "
            "Give a longer one, or a plan that was saved."
        )
    hf = as_model(model)
    assert isinstance(hf, HFModel)
    check_scores(hf)
    count = len(layer_kinds(hf.model.config))
    anchors = max(1, count // LAYERS_OF_AN_ANCHOR) if anchors is None else anchors
    if isinstance(anchors, bool) or anchors < 1:
        raise ValueError(f"anchors is a number of layers, at least 1, got {anchors!r}.")
    few = max(1, len(text) // pattern.block // _BLOCKS_OF_A_CHOICE)
    pattern = replace(pattern, top=min(pattern.top, few))
    noted = _read(hf, text, params, pattern).noted
    found = best_reuse(noted, anchors)
    return KascadePlan(
        **identity(hf.model), layers=tuple(found.get(i) for i in range(count)),
        tokens=len(text), block=pattern.block, top=pattern.top,
    )  # fmt: skip


def _read(model: HFModel, text: Tensor, params: ContextParams, pattern: Kascade) -> Calibration:
    calibration = Calibration(pattern)
    probed: Any = replace(params, sparse=calibration, n_batch=CHUNK)
    with torch.inference_mode(), model.attached(probed) as attached:
        cache = attached.new_cache(probed, reserve=len(text))
        for chunk in text.to(model.device).split(CHUNK):
            calibration.listening[0] = cache.seen >= len(text) // 2
            attached.hidden(chunk[None], cache)
    return calibration
