"""A transformers model some of whose layers have stored weights: putting them in, what still works.

While transformers loads a model, each stored weight is represented by a stand-in, a tensor of the
right shape without memory of its own.  So transformers does everything else as ever (buffers,
tying, generation config), and layers that it has tied hold the same stand-in afterwards.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saccade.core import Unsupported
from saccade.hf.packed_experts import PackedExperts
from saccade.hf.packed_layers import (
    HalfLinear,
    HalfWeight,
    PackedEmbedding,
    PackedLinear,
    StoredLayer,
    StoredWeight,
    WeightStore,
    dequantized,
)
from saccade.ops.linear.packed import BLOCK_ROWS


def storable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Parameters that may be stored -> their layers: linear ones, and the embedding of tokens."""
    tokens: Any = model.get_input_embeddings()
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module is tokens or is_linear(module):
            found[f"{name}.weight"] = module
    return found


def left_plain(model: PreTrainedModel) -> dict[str, int]:
    """Matrices of a model with stored weights that are plain numbers -> their bytes.

    They are those of experts, which are one parameter a layer, of layers that compute something
    else, and those whose rows are no whole groups.
    """
    return {
        name: weight.nbytes
        for name, weight in model.named_parameters()
        if weight.ndim > 1 and min(weight.shape[-2:]) >= BLOCK_ROWS
    }


def outer_layers(model: PreTrainedModel) -> set[str]:
    """Names of the weights of the embedding of tokens and of the output head."""
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name}.weight" for name, part in modules if any(part is end for end in ends)}


class StandIns:
    """The stored weights of a model that is being loaded, and what stands for them meanwhile."""

    def __init__(self) -> None:
        self._stored: dict[int, tuple[Tensor, StoredWeight]] = {}
        self._experts: dict[int, tuple[Tensor, list[StoredWeight]]] = {}

    def of_experts(
        self, weights: list[StoredWeight], shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        """As `of`, for the parameter `[experts, out, in]` of a layer of experts."""
        one = torch.ones((), dtype=dtype)
        self._experts[one.data_ptr()] = one, weights
        return one.expand(shape)

    def of(self, weight: StoredWeight, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape and dtype that stands for a weight, and equals no other one."""
        one = torch.full((), 1.0 + len(self._stored) % 100, dtype=dtype)
        self._stored[one.data_ptr()] = one, weight
        return one.expand(shape)

    @torch.no_grad()
    def replace(self, model: PreTrainedModel, dtype: torch.dtype) -> bool:
        """Put stored weights into a model whose parameters stand for them; False if one is lost."""
        stores: dict[int, WeightStore] = {}
        for name, module in list(model.named_modules(remove_duplicate=False)):
            parameters: dict[str, nn.Parameter | None] = module._parameters  # type: ignore[assignment]
            weight = parameters.get("weight")
            found = None if weight is None else self._stored.get(weight.data_ptr())
            if weight is None or found is None:
                continue
            store = stores.setdefault(weight.data_ptr(), WeightStore(found[1]))
            made = _layer(module, store, dtype)
            if made is None:  # a layer of another kind: plain numbers
                plain = dequantized(found[1], dtype)
                module._parameters["weight"] = nn.Parameter(
                    plain.T.contiguous() if type(module) is Conv1D else plain
                )
                continue
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
        experts = self._replace_experts(model, dtype)
        if stores or experts:
            _adopt(model)
        return (len(stores), experts) == (len(self._stored), len(self._experts))

    def _replace_experts(self, model: PreTrainedModel, dtype: torch.dtype) -> int:
        """Put the matrices of experts into their layers; how many layers' parameters they were."""
        count = 0
        for module in list(model.modules()):
            for name, parameter in list(module._parameters.items()):
                found = None if parameter is None else self._experts.get(parameter.data_ptr())
                if found is not None:
                    del module._parameters[name]
                    module.add_module(name, PackedExperts(found[1], dtype))
                    count += 1
        if count:  # the others multiply by the matrices of all experts at once
            own: Any = model.config
            own._experts_implementation = "eager"
        return count


def _layer(module: nn.Module, store: WeightStore, dtype: torch.dtype) -> StoredLayer | None:
    """The layer that takes a module's place; None for one that computes something else."""
    if is_linear(module):
        kind = HalfLinear if isinstance(store.value, HalfWeight) else PackedLinear
        return kind(store, module._parameters["bias"], dtype, training=module.training)
    factor = embedding_factor(module)
    if factor is None:
        return None
    padding: Any = getattr(module, "padding_idx", None)
    made = PackedEmbedding(store, dtype, padding_idx=padding, factor=factor)
    return made.train(module.training)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes what `nn.Linear` does (or `Conv1D`, its transpose).

    Classes that inherit from it are asked: a copy with a small matrix is given numbers.
    """
    if type(module) in (nn.Linear, Conv1D) or not isinstance(module, nn.Linear):
        return type(module) in (nn.Linear, Conv1D)
    asked: Any = copy.copy(module)
    bias = None if getattr(module, "bias", None) is None else nn.Parameter(torch.arange(3.0))
    asked._parameters = {"weight": nn.Parameter(torch.arange(12.0).view(3, 4)), "bias": bias}
    x = torch.eye(4)[None]
    try:
        with torch.no_grad():
            return torch.equal(asked(x), nn.functional.linear(x, asked.weight, asked.bias))
    except Exception:  # one that is called in another way
        return False


def embedding_factor(module: nn.Module) -> float | None:
    """What an embedding multiplies its rows by; None where it does something else to them.

    It is asked: a copy of it with a small table is given token ids.
    """
    if type(module) is nn.Embedding:
        return 1.0
    asked: Any = copy.copy(module)
    asked._parameters = {"weight": nn.Parameter(torch.eye(5), requires_grad=False)}
    ids = torch.arange(5)[None]
    try:
        with torch.no_grad():
            rows = asked(ids)
    except Exception:  # one that is called in another way
        return None
    factor = rows.flatten()[0].item() if rows.numel() else 0.0
    same = rows.shape == (1, 5, 5) and torch.equal(rows[0], factor * torch.eye(5))
    return factor if same else None


def _adopt(model: PreTrainedModel) -> None:
    """Give a model with stored weights what transformers computes from parameters otherwise."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            changed: Any = part
            changed._tied_weights_keys, changed.all_tied_weights_keys = None, {}
    model.requires_grad_(False)
    own: Any = model
    own.num_parameters = partial(_num_parameters, model)
    own.save_pretrained = partial(_refuse_saving, model)
    own.resize_token_embeddings = partial(_refuse_resizing, model)


def _num_parameters(
    model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As of the model with plain weights, none of which can be trained here."""
    skipped = (nn.Embedding, PackedEmbedding) if exclude_embeddings else ()
    left_out = {
        id(part)
        for module in model.modules()
        if isinstance(module, skipped)
        for part in (*module.parameters(), *module.modules())
    }
    plain = sum(
        each.numel()
        for each in model.parameters()
        if id(each) not in left_out and (each.requires_grad or not only_trainable)
    )
    stores = [part for part in model.modules() if isinstance(part, WeightStore)]
    return plain + sum(
        store.value.shape[0] * store.value.shape[1]
        for store in stores
        if id(store) not in left_out and not only_trainable
    )


def _refuse_saving(_: nn.Module, *args: Any, **options: Any) -> None:
    raise Unsupported(
        "a model with packed weights cannot be saved by transformers: load it with "
        'weights="bf16" or "f32" and save that.'
    )


def _refuse_resizing(model: PreTrainedModel, new: int | None = None, *_: Any, **__: Any) -> Any:
    embedding: Any = model.get_input_embeddings()
    if new is None or new == embedding.num_embeddings:
        return embedding
    raise Unsupported(
        f"packed embeddings keep their {embedding.num_embeddings} rows, got {new}: load the model "
        'with weights="bf16" or "f32" to resize them.'
    )
