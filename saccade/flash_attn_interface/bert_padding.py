"""Taking padding out of a batch and putting it back, as flash_attn.bert_padding does.

unpad_input makes of a padded batch the packed tokens and lengths that `flash_attn_varlen_func`
takes; pad_input is its inverse.  All of them are differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """The rows `[n, ...]` of x `[rows, ...]` that int64 indices `[n]` name."""
    return x[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """Zeros `[first_axis_dim, ...]` with the values `[n, ...]` at the rows that indices name."""
    empty = values.new_zeros(first_axis_dim, *values.shape[1:])
    return empty.index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The real tokens of a padded batch, one sequence behind another.

    Args:
        hidden_states: `[batch, seqlen, ...]`.
        attention_mask: `[batch, seqlen]`, 1 or True for real tokens.
        unused_mask: likewise, tokens that get a place but are not used.

    Returns:
        (tokens `[n, ...]`, their int64 indices `[n]` in `[batch * seqlen]`, int32 cumulative
        lengths `[batch + 1]`, the longest length, int32 lengths `[batch]` without unused tokens).
    """
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    taken = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = taken.sum(dim=-1, dtype=torch.int32)
    indices, cu_seqlens, longest = _packs(taken, lengths)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest, used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The real tokens of a batch whose rows hold several sequences each.

    Args:
        hidden_states: `[batch, seqlen, ...]`.
        attention_mask_in_length: `[batch, seqlen]` integers: the lengths of the sequences of a
            row, in order, then zeros.

    Returns:
        The first four of `unpad_input`; cumulative lengths are `[sequences + 1]`.
    """
    rows = attention_mask_in_length
    real = torch.arange(rows.shape[1], device=rows.device) < rows.sum(dim=-1, keepdim=True)
    indices, cu_seqlens, longest = _packs(real, rows[rows != 0].int())
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest


def _packs(real: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Indices of the real tokens, cumulative lengths, the longest length."""
    indices = real.flatten().nonzero().flatten()
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return indices, cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch `[batch, seqlen, ...]` of packed tokens `[n, ...]`, 0 for padding.

    Args:
        indices: of `unpad_input`.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.unflatten(0, (batch, seqlen))
