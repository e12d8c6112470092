"""Masks that are tensors already, as the operator takes them: bool, True = attend."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Unsupported
from saccade.core.check import describe
from saccade.core.host_memo import HostMemo

_BIASED = (
    "a floating-point attention_mask may hold only 0 and -inf (or the dtype's minimum): "
    "saccade attention adds no bias. Use attn_implementation='eager' for biased scores."
)  # no double quotes: inductor copies the sentence into a C++ string as it is


def boolean_mask(mask: Tensor, query: Tensor, num_keys: int) -> Tensor:
    """A mask as bool `[B | 1, H | 1, Lq, num_keys]`, or padding `[B, num_keys]`.

    Args:
        mask: `[B | 1, H | 1, Lq | 1, num_keys]`, bool or 0 / -inf; or `[B, num_keys]` of real keys.
        query: `[B, H, Lq, D]`.

    Raises:
        Unsupported: another shape, or numbers that are a bias and not a mask.
    """
    batch, heads, q_len, _ = query.shape
    if mask.ndim == 2 and mask.shape == (batch, num_keys):
        return _padding(mask.to(query.device))
    fits = mask.ndim == 4 and mask.shape[3] == num_keys and mask.shape[2] in (1, q_len)
    if not fits or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise Unsupported(
            "attention_mask must be [batch, keys] or [batch, heads, queries, keys], here "
            f"[{batch}, {num_keys}] or [1 | {batch}, 1 | {heads}, 1 | {q_len}, {num_keys}], got "
            f"{list(mask.shape)}. Pass a 2-D mask or a full 4-D one."
        )
    mask = mask.to(query.device)
    if mask.dtype != torch.bool:
        if not mask.is_floating_point():
            raise Unsupported(
                f"a 4-D attention_mask must be bool (True = attend) or floating-point (0 and -inf, "
                f"added to the scores), got {describe(mask)}. Convert it with mask.bool() or "
                "torch.where."
            )
        mask = _visible(mask)
    return mask if mask.shape[2] == q_len else mask.expand(-1, -1, q_len, -1)


def _padding(mask: Tensor) -> Tensor:
    """A 2-D mask of ones and zeros as bool."""
    return mask if mask.dtype == torch.bool else _real(mask)


def check_values(holds: Tensor, sentence: str) -> None:
    """Raise unless true; in a compiled graph, which cannot branch on a value, when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, sentence)  # pyright: ignore[reportPrivateImportUsage]
    elif not bool(holds):
        raise Unsupported(sentence)


def _read_real(mask: Tensor) -> Tensor:
    check_values(
        ((mask == 0) | (mask == 1)).all(),
        "a 2-D attention_mask holds 1 for real keys and 0 for padding, and nothing else. For "
        "scores to add pass a 4-D floating-point mask.",
    )
    return mask == 1


def _read_visible(mask: Tensor) -> Tensor:
    visible = mask == 0
    check_values((visible | (mask <= torch.finfo(mask.dtype).min / 2)).all(), _BIASED)
    return visible


_real = HostMemo(_read_real)  # once for all layers
_visible = HostMemo(_read_visible)
