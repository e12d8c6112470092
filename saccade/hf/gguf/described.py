"""From a GGUF file to a config and a model: everything in the file is used, or said, or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from saccade.core import BadInput
from saccade.hf.gguf.facts import Facts, missing
from saccade.hf.gguf.file import TensorInfo
from saccade.hf.gguf.rows import ALIASES, ROWS, Row, values_of
from saccade.hf.gguf.shards import read_gguf, shard_stem
from saccade.hf.gguf.tensors import source_of
from saccade.hf.meta_model import without_memory
from saccade.hf.tensor_files import named

_DERIVED: Final = re.compile(r"blk\.\d+\.(attn_rot_embd|attn\.rotary_emb\.inv_freq)(\.weight)?")
"""Tensors of old files that repeat what the header says; llama.cpp skips them, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What a file says, without its weights.

    Attributes:
        name: of the model, for tables.
        n_ctx_train: length the file was made for.
        notes: sentences for the user.
    """

    config: PreTrainedConfig
    row: Row
    facts: Facts
    name: str
    n_ctx_train: int
    notes: list[str]


def describe(path: Path) -> Described:
    """The config of a GGUF file, or of the split model that it is a shard of.

    Raises:
        BadInput: damaged, incomplete, an architecture that is not in the table, or a value that
            cannot be or that transformers' model cannot follow.
    """
    file = read_gguf(path)
    if file.keys.get("general.type", "model") != "model":
        raise BadInput(
            f"{path} holds a {file.keys['general.type']}: expected a whole language model."
        )
    architecture = file.keys.get("general.architecture", "")
    facts = Facts(file, str(architecture))
    row = ROWS.get(ALIASES.get(str(architecture), str(architecture)))
    if row is None:
        raise BadInput(
            f"{path} holds a model of the architecture {architecture!r}, which saccade cannot load "
            f"from GGUF: expected {', '.join(ROWS)}."
        )
    if not isinstance(row, Row):
        row = row(facts)
    values = values_of(facts, row)
    config = CONFIG_MAPPING[row.model_type](**values)
    n_ctx_train = facts.integer("context_length")
    notes = [*facts.notes, *_unknown_keys(facts)]
    return Described(
        config=config,
        row=row,
        facts=facts,
        name=shard_stem(path),
        n_ctx_train=n_ctx_train,
        notes=notes,
    )


def _unknown_keys(facts: Facts) -> list[str]:
    unused = facts.unused_keys()
    if not unused:
        return []
    return [
        f"the file says {named(unused, most=8)}, which saccade does not know: the model may answer "
        "otherwise than it was trained to."
    ]


def check_tensors(described: Described) -> PreTrainedModel:
    """The model without memory, after checking that the file's tensors are its parameters.

    Raises:
        BadInput: tensors are missing, left over, or of another shape than the model's.
    """
    shapes, notes = without_memory(described.config)
    described.notes.extend(notes)
    made = _assembled(shapes, described, read=lambda info: torch.empty(info.shape, device="meta"))
    _check_shapes(shapes, made, described.facts)
    return shapes


def load_weights(described: Described, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the weights of the file, in evaluation mode.

    Raises:
        BadInput: as `check_tensors`.
    """
    shapes = check_tensors(described)
    state = _assembled(shapes, described, read=lambda info: info.read().to(dtype))
    loaded: Any = type(shapes).from_pretrained(
        None,
        config=described.config,
        state_dict=state,
        dtype=dtype,
        attn_implementation=shapes.config._attn_implementation,
        output_loading_info=True,
    )
    model, info = loaded
    lost = {*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]}
    assert not lost, lost
    model.config.name_or_path = described.name
    return model.eval()


def _assembled(shapes: PreTrainedModel, described: Described, read: Any) -> dict[str, Tensor]:
    """Parameter -> what its tensors make.  With `read` on the meta device, shapes alone."""
    facts, config = described.facts, described.config
    lacking: list[str] = []
    state: dict[str, Tensor] = {}
    for parameter in shapes.state_dict():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = source_of(parameter, described.row.sources, config)
        if found is None:
            lacking.append(parameter)
            continue
        names, make, place = found
        infos = [_info(facts, name) for name in names]
        lacking += [name for name, info in zip(names, infos, strict=True) if info is None]
        if None not in infos:
            state[parameter] = _made(facts, names, make, place, [read(info) for info in infos])
    left = facts.file.tensors.keys() - facts.used_tensors
    if lacking:
        raise missing(facts.file, lacking)
    if left := {name for name in left if not _DERIVED.fullmatch(name)}:
        raise BadInput(
            f"{facts.file.path} has {len(left)} tensors that a model of the class "
            f"{type(shapes).__name__} has no place for: {named(left)}. It would answer wrongly "
            "without them."
        )
    return state


def _info(facts: Facts, name: str) -> TensorInfo | None:
    for one in name.split("|"):
        if one in facts.file.tensors:
            facts.used_tensors.add(one)
            return facts.file.tensors[one]
    return None


def _made(facts: Facts, names: list[str], make: Any, place: Any, parts: list[Tensor]) -> Tensor:
    try:
        return make(parts, place)
    except (RuntimeError, IndexError, ZeroDivisionError) as error:
        raise _misshapen(facts, names[0], tuple(parts[0].shape)) from error


def _check_shapes(shapes: PreTrainedModel, made: dict[str, Tensor], facts: Facts) -> None:
    wanted = shapes.state_dict()
    for name, tensor in made.items():
        if tensor.shape != wanted[name].shape:
            raise _misshapen(facts, name, tuple(tensor.shape), tuple(wanted[name].shape))


def _misshapen(
    facts: Facts, name: str, shape: tuple[int, ...], wanted: tuple[int, ...] | None = None
) -> BadInput:
    other = f" where its keys say {wanted}" if wanted else ", which its keys do not fit"
    return BadInput(
        f"{facts.file.path} gives {name} the shape {shape}{other}: it is damaged. "
        "Download or convert it again."
    )
