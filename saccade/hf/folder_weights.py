"""The weights of a folder in another form than its files have: cast or rounded one by one."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from saccade.hf.file_map import FileMaps
from saccade.hf.packed_model import StandIns, outer_layers, rounded, storable
from saccade.hf.placement import Form
from saccade.hf.streamed_model import Read, streamed_model
from saccade.hf.tensor_files import Stored, Tensors

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
    stand_ins, maps = StandIns(), FileMaps()
    reads: dict[str, tuple[tuple[int, ...], Read]] = {}
    layers, outer = storable(shapes), outer_layers(shapes)
    for name, stored in files.items():
        own = _own_name(shapes, name)
        read = partial(_plain, maps, stored, dtype)
        if form != "plain" and own in layers and stored.shape == layers[own].weight.shape:
            conv = not isinstance(layers[own], nn.Linear | nn.Embedding)
            read = partial(_rounded, read, stand_ins, form, own in outer, conv)
        reads[name] = stored.shape, partial(_dropping, read, maps, stored)
    model, info = streamed_model(shapes, config, reads, dtype)
    if form == "plain" or stand_ins.replace(model, dtype):
        return model, info
    return None, None


def round_layers(model: PreTrainedModel, form: Form, dtype: torch.dtype) -> None:
    """Round the linear layers and the embedding of a loaded model; the rest is cast."""
    stand_ins = StandIns()
    outer = outer_layers(model)
    done: dict[int, nn.Parameter] = {}
    for name, layer in storable(model).items():
        weight: Any = layer.weight
        if id(weight) not in done:
            conv = not isinstance(layer, nn.Linear | nn.Embedding)
            made = _rounded(lambda w=weight: w.detach(), stand_ins, form, name in outer, conv)
            done[id(weight)] = nn.Parameter(made, requires_grad=False)
            layer._parameters["weight"] = None
        layer._parameters["weight"] = done[id(weight)]
    stand_ins.replace(model, dtype)
    model.to(dtype)


def _own_name(shapes: PreTrainedModel, name: str) -> str:
    """The model's name for a tensor that its base class may have saved."""
    return name if name in shapes.state_dict() else f"{shapes.base_model_prefix}.{name}"


def _plain(maps: FileMaps, stored: Stored, dtype: torch.dtype) -> Tensor:
    raw = maps[stored.path].at(stored.start, stored.n_bytes)
    numbers = raw.clone() if stored.start % 8 else raw  # aligned as views of wider numbers need
    numbers = numbers.view(_DTYPES[stored.dtype]).view(stored.shape)
    return numbers.to(dtype if numbers.is_floating_point() else numbers.dtype, copy=True)


def _rounded(read: Read, stand_ins: StandIns, form: Form, outer: bool, transposed: bool) -> Tensor:
    """What stands for a rounded matrix; the matrix itself where it cannot be rounded."""
    matrix = read()
    found = rounded(matrix.T.contiguous() if transposed else matrix, form, outer)
    return matrix if found is None else stand_ins.of(found, tuple(matrix.shape), matrix.dtype)


def _dropping(read: Read, maps: FileMaps, stored: Stored) -> Tensor:
    try:
        return read()
    finally:
        maps[stored.path].drop(stored.start, stored.n_bytes)
