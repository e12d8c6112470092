"""What the heads of each layer compute on a calibration text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import BadInput
from saccade.hf.convert_aligned import Moments
from saccade.hf.heads import FUSED, SEPARATE, split_rows
from saccade.hf.layers import attention_modules
from saccade.hf.split_forward import hidden_states
from saccade.runtime.token_ids import token_ids

ROW: Final = 512
"""Tokens of a row that a flat text is cut into."""


def rows_of(calibration: Tensor, vocab_size: int, length: int = ROW) -> Tensor:
    """Token ids `[rows, n]` of a text `[n]`, or of rows that are given as they are.

    Raises:
        BadInput: no whole numbers, outside the vocabulary, or fewer than two tokens.
    """
    given = torch.as_tensor(calibration)
    flat = token_ids(given.flatten() if given.dim() == 2 else given, vocab_size)
    width = given.shape[1] if given.dim() == 2 else min(length, len(flat))
    if width < 2:
        raise BadInput(
            f"calibration needs at least two tokens in a row, got the shape {list(given.shape)}. "
            "Give a few thousand tokens of ordinary text."
        )
    return flat[: len(flat) // width * width].view(-1, width)


@torch.no_grad()
def moments_of(
    model: PreTrainedModel, rows: Tensor, num_heads: int, num_kv_heads: int
) -> list[Moments]:
    """Moments of every attention layer on rows of token ids `[rows, n]`."""
    modules = [module for _, module in attention_modules(model)]
    found: list[Moments | None] = [None] * len(modules)
    heads = (num_heads, num_kv_heads, num_kv_heads)

    def watch(index: int) -> Callable[[Sequence[Tensor]], None]:
        def take(parts: Sequence[Tensor]) -> None:
            split = (
                p.flatten(0, -2).unflatten(-1, (n, -1)) for p, n in zip(parts, heads, strict=True)
            )
            new, old = Moments.of(*split), found[index]
            found[index] = new if old is None else old + new

        return take

    with ExitStack() as undo:
        for index, module in enumerate(modules):
            _watch(undo, module, heads[0], heads[1], watch(index))
        for row in rows.split(1):
            hidden_states(model, input_ids=row.to(model.device), use_cache=False)
    return [each for each in found if each is not None]


def _watch(
    undo: ExitStack,
    module: nn.Module,
    num_heads: int,
    num_kv_heads: int,
    take: Callable[[Sequence[Tensor]], None],
) -> None:
    """Call `take` with the (q, k, v) `[B, t, numbers]` that a layer projects."""
    made: dict[str, Tensor] = {}

    def end(_: nn.Module, __: Any, ___: Any) -> None:
        if FUSED in made:
            parts = split_rows(made[FUSED].movedim(-1, 0), num_heads, num_kv_heads)
            take([part.movedim(0, -1) for part in parts])
        else:
            take([made[name] for name in SEPARATE])
        made.clear()

    for name in (FUSED,) if hasattr(module, FUSED) else SEPARATE:

        def keep(_: nn.Module, __: Any, result: Tensor, name: str = name) -> None:
            made[name] = result

        undo.callback(getattr(module, name).register_forward_hook(keep).remove)
    undo.callback(module.register_forward_hook(end).remove)
