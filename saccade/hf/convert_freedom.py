"""How far the heads of a model may be turned without a change of its output, found by trying.

Whether the queries undo what is done to keys, and the output projection what is done to values,
depends on what a class does in between: norms of each head, gates, rotary positions of any form.
So each change is made to the model, at random, and allowed where its output stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.core import Unsupported
from saccade.hf.convert_pairs import Pairs, invertible
from saccade.hf.heads import Heads, layers_of, read_heads
from saccade.hf.layers import attention_modules
from saccade.hf.model import HFModel
from saccade.runtime.params import ContextParams

_TOKENS: Final = 24


@dataclass(frozen=True, slots=True)
class Freedom:
    """What may be done to the heads of one layer.

    Attributes:
        pairs: of dimensions of keys that queries can undo; None where keys stay as they are.
        only_signs: whether those may only change their sign, since keys are normed.
        values: whether the output projection undoes a change of values.
    """

    pairs: Pairs | None = None
    only_signs: bool = False
    values: bool = False


@torch.no_grad()
def freedoms(
    model: PreTrainedModel, num_heads: int, num_kv_heads: int
) -> tuple[list[Freedom], list[str]]:
    """What each attention layer allows, and a sentence for what none does."""
    modules = [module for _, module in attention_modules(model)]
    heads = [read_heads(module, num_heads, num_kv_heads) for module in modules]
    pairs = _pairs(model, heads)
    notes: list[str] = []
    values = Freedom(values=True)
    if not _allowed(model, modules, heads, [values] * len(heads)):
        values = Freedom()
        notes.append(
            "values are averaged as they are, since something between them and the output "
            "projection would not allow another basis."
        )
    for signs in (False, True):
        tried = [Freedom(pairs=p, only_signs=signs) for p in pairs or ()]
        if tried and _allowed(model, modules, heads, tried):
            if signs:
                notes.append("keys are averaged up to signs only, since each head's are normed.")
            return [replace(each, values=values.values) for each in tried], notes
    notes.append("keys are averaged as they are, since their positions allow no other basis.")
    return [values] * len(heads), notes


def _pairs(model: PreTrainedModel, heads: Sequence[Heads]) -> list[Pairs] | None:
    """The rotated pairs of each layer; None where they are not known."""
    try:
        with HFModel(model).attached(ContextParams()) as runner:
            rotations: list[Any] = [runner.shift_keys(layer) for layer in range(len(heads))]
        return [Pairs.of(r, each.k.shape[1]) for r, each in zip(rotations, heads, strict=True)]
    except (Unsupported, IndexError):
        return None


def _allowed(
    model: PreTrainedModel,
    modules: Sequence[nn.Module],
    heads: Sequence[Heads],
    freedom: Sequence[Freedom],
) -> bool:
    """Whether the output stays the same when heads are turned at random as far as that allows."""
    if any(each.q.shape[1] != each.k.shape[1] or each.o is None for each in heads):
        return False  # queries hold more than queries: a gate, for example
    random = torch.Generator().manual_seed(0)
    made = [
        layers_of(module, turned(each, allowed, random), each)
        for module, each, allowed in zip(modules, heads, freedom, strict=True)
    ]
    before = _output(model)
    with ExitStack() as undo:
        for module, layers in zip(modules, made, strict=True):
            put_layers(undo, module, layers)
        after = _output(model)
    exact = torch.finfo(model.dtype).bits >= 32
    size = (before - before.mean(-1, keepdim=True)).square().mean().sqrt()
    return bool((after - before).square().mean().sqrt() <= (2e-3 if exact else 0.15) * size)


def put_layers(undo: ExitStack, module: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    """Replace layers of a module, noting that the old ones have to come back."""
    for name, layer in layers.items():
        undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, layer)


def _output(model: PreTrainedModel) -> Tensor:
    embeddings: Any = model.get_input_embeddings()
    tokens = torch.linspace(1, len(embeddings.weight) - 1, _TOKENS, dtype=torch.float64).long()[
        None
    ]
    return model(input_ids=tokens.to(model.device), use_cache=False).logits.float()


def turned(heads: Heads, freedom: Freedom, random: torch.Generator) -> Heads:
    """The same layer in another basis of each head, drawn at random."""
    per = len(heads.q) // len(heads.k)
    q, k, v, o = heads.q, heads.k, heads.v, heads.o
    if freedom.pairs is not None:
        q, k = q.clone(), k.clone()
        for block in freedom.pairs.blocks():
            turn = block.draw(len(k), random, only_signs=freedom.only_signs).to(k.device)
            _turn(block.take, block.put, k, turn)
            _turn(block.take, block.put, q, turn.inverse().mH.repeat_interleave(per, dim=0))
    if freedom.values and o is not None:
        basis = invertible(len(v), v.shape[1], random)
        back = basis.inverse().to(v).repeat_interleave(per, dim=0)
        v, o = basis.to(v) @ v, torch.einsum("ohd,hde->ohe", o, back)
    return Heads(q, k, v, o)


def _turn(
    take: Callable[[Tensor], Tensor],
    put: Callable[[Tensor, Tensor], None],
    rows: Tensor,
    turn: Tensor,
) -> None:
    """Multiply dimensions of `rows` by invertible maps `[heads, blocks, n, n]`."""
    work = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    mixed = take(work)
    put(rows, (turn.to(mixed.dtype) @ mixed).to(mixed.dtype))
