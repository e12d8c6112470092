"""The weights of a folder in another form than its files have: cast or rounded one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from saccade.hf.file_map import FileMaps
from saccade.hf.packed_model import StandIns, outer_layers, storable
from saccade.hf.rounded_weights import rounded
from saccade.hf.streamed_model import Read, streamed_model
from saccade.hf.tensor_files import Stored, Tensors
from saccade.runtime.placement import Form

_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(slots=True)
class _Rounding:
    """Matrices that are rounded, and what stands for them until the model is built."""

    form: Form
    dtype: torch.dtype
    stand_ins: StandIns = field(default_factory=StandIns)

    def read(self, plain: Read, numbers: Read, transposed: bool, outer: bool) -> Tensor:
        """What stands for a rounded matrix; the plain matrix where it cannot be rounded.

        Args:
            numbers: of the matrix, of which a few rows are copied at a time.
        """
        given = numbers()
        matrix = given.T if transposed else given
        out, width = matrix.shape

        def rows(first: int, end: int) -> Tensor:
            return matrix[first:end].float()

        found = rounded(rows, (out, width), self.form, outer)
        return plain() if found is None else self.stand_ins.of(found, given.shape, self.dtype)


def read_folder(
    shapes: PreTrainedModel,
    config: PreTrainedConfig,
    files: Tensors,
    dtype: torch.dtype,
    form: Form,
) -> tuple[PreTrainedModel | None, dict[str, Any] | None]:
    """The model, and what transformers says of its keys; None where this cannot be read so.

    That is, files with numbers of other dtypes, or whose names transformers changes.
    """
    if any(each.dtype not in _DTYPES for each in files.values()):
        return None, None
    rounding, maps = _Rounding(form, dtype), FileMaps()
    reads: dict[str, tuple[tuple[int, ...], Read]] = {}
    layers, outer = storable(shapes), outer_layers(shapes)
    for name, stored in files.items():
        own = _own_name(shapes, name)
        read = partial(_plain, maps, stored, dtype)
        if form != "plain" and own in layers and stored.shape == layers[own].weight.shape:
            conv, numbers = isinstance(layers[own], Conv1D), partial(_numbers, maps, stored)
            read = partial(rounding.read, read, numbers, conv, own in outer)
        reads[name] = stored.shape, partial(_dropping, read, maps, stored)
    model, info = streamed_model(shapes, config, reads, dtype)
    if form == "plain" or rounding.stand_ins.replace(model, dtype):
        return model, info
    return None, None


def round_layers(model: PreTrainedModel, form: Form, dtype: torch.dtype) -> None:
    """Round the linear layers and the embedding of a loaded model; the rest is cast."""
    rounding, outer = _Rounding(form, dtype), outer_layers(model)
    done: dict[int, nn.Parameter] = {}
    for name, layer in storable(model).items():
        weight: Any = layer.weight
        if id(weight) not in done:
            read = partial(torch.Tensor.detach, weight)
            made = rounding.read(read, read, isinstance(layer, Conv1D), name in outer)
            done[id(weight)] = nn.Parameter(made, requires_grad=False)
        layer._parameters["weight"] = done[id(weight)]
    rounding.stand_ins.replace(model, dtype)
    cast: Any = model
    cast.to(dtype)


def _own_name(shapes: PreTrainedModel, name: str) -> str:
    """The model's name for a tensor that its base class may have saved."""
    return name if name in shapes.state_dict() else f"{shapes.base_model_prefix}.{name}"


def _numbers(maps: FileMaps, stored: Stored) -> Tensor:
    """As the file has them: a view of it."""
    raw = maps[stored.path].at(stored.start, stored.n_bytes)
    return raw.view(_DTYPES[stored.dtype]).view(stored.shape)


def _plain(maps: FileMaps, stored: Stored, dtype: torch.dtype) -> Tensor:
    numbers = _numbers(maps, stored)
    return numbers.to(dtype if numbers.is_floating_point() else numbers.dtype, copy=True)


def _dropping(read: Read, maps: FileMaps, stored: Stored) -> Tensor:
    try:
        return read()
    finally:
        maps[stored.path].drop(stored.start, stored.n_bytes)
