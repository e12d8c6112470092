"""Arguments that reach an attention function beyond its own: used, known not to matter, or refused.

Models pass on whatever they were called with, so that a new kind of attention may ask for something
by a new name.  A name that is in neither table below and carries a value is therefore refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from saccade.core import Unsupported

USED: Final = frozenset(
    {"position_ids", "use_cache", "cu_seq_lens_q", "cu_seq_lens_k", "output_attentions"}
)
"""Read by `saccade.hf.packing` and `saccade.hf.attention_weights`."""

HARMLESS: Final = frozenset(
    {
        # lengths that go with the cumulative ones
        "max_length_q",
        "max_length_k",
        # of the loss, of other layers and of what the model returns
        "labels",
        "shift_labels",
        "ignore_index",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "seq_idx",  # of state space layers
        "deterministic",  # of FlashAttention's gradients
        # the position of the queries is that of their keys, and RoPE was applied
        "cache_position",
        "position_embeddings",
        # keys and values were made of these before
        "past_key_value",
        "past_key_values",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
    }
)
"""Change nothing about the attention of one layer, in eager attention neither."""

_MEANING: Final = {
    "position_bias": "adds a learned position bias to the scores (T5 and similar)",
    "indices": "selects single keys by an indexer (DeepSeek sparse attention)",
    "block_indices": "selects blocks of keys by an indexer (MiniMax sparse attention)",
    "block_table": "runs in transformers' continuous batching",
    "cache": "runs in transformers' continuous batching",
    "head_mask": "multiplies the attention weights of single heads",
}


def check_arguments(module: nn.Module, dropout: float, kwargs: Mapping[str, Any]) -> None:
    """Raise unless every argument that carries a value is used or known not to matter.

    Raises:
        Unsupported: dropout, or an argument of unknown meaning.
    """
    if dropout > 0:
        raise Unsupported(
            f"saccade attention has no dropout on attention weights, got dropout={dropout}. "
            "Set config.attention_dropout to 0, or train with another attn_implementation."
        )
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in USED and name not in HARMLESS:
            unknown = f"was given {name!r}, and what that does to attention is not known here"
            raise Unsupported(
                f"saccade attention cannot run {type(module).__name__}: it "
                f"{_MEANING.get(name, unknown)}. "
                'Use attn_implementation="eager" for this model.'
            )
