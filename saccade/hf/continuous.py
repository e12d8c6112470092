"""transformers' continuous batching, `model.generate_batch`, with saccade's attention.

Continuous batching packs the newest tokens of all requests into one row, keeps keys in pages of its
own, and calls an attention function with cumulative lengths.  It takes no names but "sdpa", "eager"
and those with "flash" in them, and for the latter `set_attn_implementation` loads a package.  So
the name is written into the model's config, for a `with` block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Final

import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from saccade.core import Unsupported
from saccade.core.host_memo import capturing
from saccade.hf.attach import checked_model
from saccade.hf.attention import saccade_attention
from saccade.hf.changes import name_implementation
from saccade.hf.extra_arguments import check_arguments
from saccade.hf.layers import check_attention
from saccade.hf.runs import Undo, surely
from saccade.ops import attention

FLASH_KEY: Final = "saccade_flash"
"""Without 2, 3 or 4: for those transformers imports flash-attn's own functions."""

_OF_THE_CACHE: Final = {"read_index", "write_index", "logits_indices", "logits_processor_args"}
"""What continuous batching passes to its cache and to the choice of tokens."""


@contextmanager
def continuous_batching(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`with continuous_batching(model): model.generate_batch(...)` uses saccade's attention.

    Only the model's config is changed, and put back on exit.  On a GPU pass
    `ContinuousBatchingConfig(use_cuda_graph=False)`: the lengths of packed sequences are read
    on the host, which a captured graph cannot do.

    Args:
        model: a transformers model whose attention goes through the attention interface.

    Raises:
        TypeError: what is no transformers model.
        Unsupported: a model that computes attention itself, or an old transformers.
    """
    model = checked_model(model)
    check_attention(model)
    _check_version()
    AttentionInterface.register(FLASH_KEY, packed_attention)
    AttentionMaskInterface.register(FLASH_KEY, flash_attention_mask)
    undo = Undo()
    try:
        name_implementation(undo, model, FLASH_KEY)
        yield model
    finally:
        surely(undo.run)


def _check_version() -> None:
    """Raise Unsupported for a cache that wants other arguments than `packed_attention` passes."""
    from transformers.generation.continuous_batching import PagedAttentionCache

    update: Any = vars(PagedAttentionCache)["update"]
    if "kwargs" not in signature(update).parameters:
        raise Unsupported(
            "saccade serves the continuous batching of transformers 5.23, whose cache takes other "
            f"arguments than that of {transformers.__version__}. Update transformers."
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer in a step of continuous batching: `[1, tokens, Hq, Dv]` and None.

    Args:
        query: `[1, Hq, tokens, D]`, the newest tokens of all requests; key, value alike.
        cache: transformers' PagedAttentionCache; None for a call of another kind, which is
            `saccade_attention`'s.

    Raises:
        Unsupported: dropout, arguments of unknown meaning, a graph that is captured.
    """
    if cache is None:
        return saccade_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            is_causal,
            sliding_window,
            softcap,
            s_aux,
            **kwargs,
        )
    others = {name: given for name, given in kwargs.items() if name not in _OF_THE_CACHE}
    check_arguments(module, dropout, others)
    if capturing(query.device):
        raise Unsupported(
            "saccade's continuous batching reads lengths on the host, which a CUDA graph cannot. "
            "Pass ContinuousBatchingConfig(use_cuda_graph=False)."
        )
    keys, values = cache.update(key, value, module.layer_idx, kwargs)  # and lengths of this layer
    out = attention(
        query,
        keys,
        values,
        window=sliding_window,
        scale=scaling,
        softcap=softcap,
        sink_logits=s_aux,
        cu_seqlens=(kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]),
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None
