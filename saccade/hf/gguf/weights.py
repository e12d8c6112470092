"""The weights of a GGUF file in a model: read one tensor at a time, in the form that is wanted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.hf.file_map import FileMaps
from saccade.hf.gguf.described import Described, Recipe, check_tensors
from saccade.hf.gguf.file import TensorInfo
from saccade.hf.packed_layers import HalfWeight, StoredWeight
from saccade.hf.packed_model import StandIns, outer_layers, storable
from saccade.hf.rounded_weights import rounded
from saccade.hf.streamed_model import streamed_model
from saccade.hf.tensor_files import named
from saccade.ops.linear import packed_blocks
from saccade.runtime.placement import Form

_SMALL: Final = 2**22
"""Numbers of a tensor that is made in float32, whatever it is rounded to afterwards."""
_HALVES: Final = {"F16": torch.float16, "BF16": torch.bfloat16}
_PLAIN: Final = ("F32", "F64", *_HALVES)


@dataclass(slots=True)
class _Weights:
    """The forms that the weights of one file get."""

    form: Form
    dtype: torch.dtype
    maps: FileMaps = field(default_factory=FileMaps)
    stand_ins: StandIns = field(default_factory=StandIns)
    kept: Counter[str] = field(default_factory=Counter[str])
    halved: Counter[str] = field(default_factory=Counter[str])
    rounded: Counter[str] = field(default_factory=Counter[str])

    def read(self, recipe: Recipe, linear: bool, outer: bool) -> Tensor:
        """A parameter, or what stands for it until the model is built."""
        made = recipe.made([torch.empty(info.shape, device="meta") for info in recipe.infos])
        if linear and (stored := self._stored(recipe, outer)) is not None:
            result = self.stand_ins.of(stored, tuple(made.shape), self.dtype)
        elif experts := self._experts(recipe):
            result = self.stand_ins.of_experts(experts, tuple(made.shape), self.dtype)
        else:
            result = self._plain(recipe)
        for info in recipe.infos:
            self.maps[info.path].drop(info.offset, info.n_bytes)
        return result

    def _plain(self, recipe: Recipe) -> Tensor:
        """In the dtype of the activations."""
        parts = [info.read(self.maps, self._read_in(info, recipe)) for info in recipe.infos]
        for info in recipe.infos if self.form == "file" else ():
            if info.kind not in _PLAIN:
                self.rounded[info.kind] += 1
        return recipe.made(parts).to(self.dtype)

    def _read_in(self, info: TensorInfo, recipe: Recipe) -> torch.dtype:
        """float32 for small tensors that are computed with before they are rounded."""
        small = recipe.source.on_rows is None and np.prod(info.shape) <= _SMALL
        return torch.promote_types(self.dtype, torch.float32) if small else self.dtype

    def _stored(self, recipe: Recipe, outer: bool) -> StoredWeight | None:
        """A matrix in a form that its layer can be computed with; None: as plain numbers."""
        (info,), on_rows = recipe.infos, recipe.source.on_rows
        if on_rows is None or len(info.shape) != 2 or self.form == "plain":
            return None
        if self.form != "file":
            raw = on_rows([info.raw(self.maps)], recipe.place)
            rows = partial(_rows_of, info, raw)
            return rounded(rows, (info.shape[0], info.shape[1]), self.form, outer)
        packed = None
        if info.kind not in _PLAIN and not info.swapped:
            packed = packed_blocks(info.kind, on_rows([info.raw(self.maps)], recipe.place))
        if packed is not None:
            self.kept[info.kind] += 1
            return packed
        return self._half(info, recipe) if self.dtype == torch.float32 else None

    def _experts(self, recipe: Recipe) -> list[StoredWeight]:
        """The matrices of experts, of which a file holds all in one tensor; none: as numbers."""
        kinds = {info.kind for info in recipe.infos}
        first, on_rows = recipe.infos[0], recipe.source.on_rows
        plain = len(kinds) > 1 or first.kind in _PLAIN or first.swapped or self.form != "file"
        if on_rows is None or len(first.shape) != 3 or plain:
            return []
        raws = [info.raw(self.maps).unflatten(0, info.shape[:2]) for info in recipe.infos]
        matrices = [on_rows([raw[i : i + 1] for raw in raws], recipe.place)[0]
                    for i in range(first.shape[0])]  # fmt: skip
        packed = [packed_blocks(first.kind, matrix) for matrix in matrices]
        if any(each is None for each in packed):
            return []
        self.kept[first.kind] += len(packed)
        return [each for each in packed if each is not None]

    def _half(self, info: TensorInfo, recipe: Recipe) -> StoredWeight | None:
        """16 bits a number, exactly those of a file that has them; None for float32 matrices."""
        if info.kind in ("F32", "F64"):
            return None
        dtype = _HALVES.get(info.kind, torch.float16)
        values = info.read(self.maps, dtype)
        if info.kind not in _HALVES and not values.isfinite().all():
            values = info.read(self.maps, dtype := torch.bfloat16)
        own = info.kind in _HALVES
        (self.kept if own else self.halved)[info.kind] += 1
        return HalfWeight(recipe.source.on_rows([values], recipe.place))  # type: ignore[misc]

    def said(self) -> list[str]:
        """What is not as it is in the file, for the user."""
        notes: list[str] = []
        if self.halved:
            notes.append(
                f"{sum(self.halved.values())} matrices of the file ({named(self.halved)}) are held "
                "with 16 bits a number: no packed form of ours holds them."
            )
        if self.rounded:
            dtype = str(self.dtype).removeprefix("torch.")
            notes.append(
                f"{sum(self.rounded.values())} tensors of the file ({named(self.rounded)}) are "
                f"held as {dtype}: their layers need plain numbers."
            )
        return notes

    def described(self) -> str:
        """The form of the weights in a few words."""
        if self.form in ("int8", "int4"):
            return self.form
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [f"{', '.join(sorted(self.kept))} as in the file"] if self.kept else []
        parts += [f"{', '.join(sorted(self.halved))} in 16 bits"] if self.halved else []
        parts += [f"{', '.join(sorted(self.rounded))} as {dtype}"] if self.rounded else []
        return "; ".join(parts) or dtype


def _rows_of(info: TensorInfo, raw: Tensor, first: int, end: int) -> Tensor:
    return info.numbers(raw[first:end], torch.float32)


def load_weights(
    described: Described, dtype: torch.dtype, form: Form
) -> tuple[PreTrainedModel, str]:
    """The model with the weights of the file, in evaluation mode, and their form in words.

    Args:
        dtype: of activations and of plain weights.
        form: of the matrices of linear layers and embeddings.

    Raises:
        BadInput: as `check_tensors`, or a kind of tensors that cannot be read.
    """
    shapes, recipes = check_tensors(described)
    for info in {info.kind: info for recipe in recipes for info in recipe.infos}.values():
        _check_kind(info)
    weights, layers = _Weights(form, dtype), storable(shapes)
    outer, own = outer_layers(shapes), shapes.state_dict()
    reads = {
        each.parameter: (
            tuple(own[each.parameter].shape),
            partial(weights.read, each, each.parameter in layers, each.parameter in outer),
        )
        for each in recipes
    }
    model, info = streamed_model(shapes, described.config, reads, dtype)
    lost = {*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]}
    assert not lost, lost
    if not weights.stand_ins.replace(model, dtype):
        raise AssertionError("a stored weight has no layer")
    described.notes.extend(weights.said())
    model.config.name_or_path = described.name
    return model.eval(), weights.described()


def _check_kind(info: TensorInfo) -> None:
    """Raise BadInput for a kind that cannot be turned into numbers."""
    if info.kind not in _PLAIN or (info.swapped and info.kind == "BF16"):
        info.dequantized(np.zeros((1, info.row_bytes), np.uint8))
