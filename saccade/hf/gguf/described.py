"""From a GGUF file to a config and a model: everything in the file is used, or said, or refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from saccade.core import BadInput
from saccade.hf.gguf.facts import Facts, missing
from saccade.hf.gguf.file import TensorInfo
from saccade.hf.gguf.rows import ALIASES, ROWS, Row, values_of
from saccade.hf.gguf.shards import read_gguf, shard_stem
from saccade.hf.gguf.tensors import Place, Source, source_of
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


def check_tensors(described: Described) -> tuple[PreTrainedModel, list[Recipe]]:
    """The model without memory and what makes its parameters of the file's tensors.

    Raises:
        BadInput: tensors are missing, left over, or of another shape than the model's.
    """
    shapes, notes = without_memory(described.config)
    described.notes.extend(notes)
    recipes = recipes_of(shapes, described)
    _check_shapes(shapes, recipes, described.facts.file.path)
    return shapes, recipes


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parameter of the model: the tensors that make it, how, and where it stands."""

    parameter: str
    infos: list[TensorInfo]
    source: Source
    place: Place

    def made(self, parts: list[Tensor]) -> Tensor:
        """The parameter from its parts.

        Raises:
            BadInput: parts of shapes that the file's keys do not fit.
        """
        try:
            return self.source.make(parts, self.place)
        except (RuntimeError, IndexError, ZeroDivisionError) as error:
            raise _misshapen(self.infos[0].path, self.infos[0].name, parts[0].shape) from error


def recipes_of(shapes: PreTrainedModel, described: Described) -> list[Recipe]:
    """What makes each parameter; every tensor of the file is used.

    Raises:
        BadInput: tensors are missing, or left over.
    """
    facts, config = described.facts, described.config
    lacking: list[str] = []
    recipes: list[Recipe] = []
    for parameter in shapes.state_dict():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = source_of(parameter, described.row.sources, config)
        if found is None:
            lacking.append(parameter)
            continue
        names, source, place = found
        infos = [_info(facts, name) for name in names]
        lacking += [name for name, info in zip(names, infos, strict=True) if info is None]
        if None not in infos:
            recipes.append(Recipe(parameter, [i for i in infos if i is not None], source, place))
    left = facts.file.tensors.keys() - facts.used_tensors
    if lacking:
        raise missing(facts.file, lacking)
    if left := {name for name in left if not _DERIVED.fullmatch(name)}:
        raise BadInput(
            f"{facts.file.path} has {len(left)} tensors that a model of the class "
            f"{type(shapes).__name__} has no place for: {named(left)}. It would answer wrongly "
            "without them."
        )
    return recipes


def _info(facts: Facts, name: str) -> TensorInfo | None:
    for one in name.split("|"):
        if one in facts.file.tensors:
            facts.used_tensors.add(one)
            return facts.file.tensors[one]
    return None


def _check_shapes(shapes: PreTrainedModel, recipes: list[Recipe], path: Path) -> None:
    wanted = shapes.state_dict()
    for recipe in recipes:
        made = recipe.made([torch.empty(info.shape, device="meta") for info in recipe.infos])
        own = wanted[recipe.parameter].shape
        if made.shape != own:
            raise _misshapen(path, recipe.parameter, made.shape, own)


def _misshapen(
    path: Path, name: str, shape: tuple[int, ...], wanted: tuple[int, ...] | None = None
) -> BadInput:
    other = f" where its keys say {tuple(wanted)}" if wanted else ", which its keys do not fit"
    return BadInput(
        f"{path} gives {name} the shape {tuple(shape)}{other}: it is damaged. "
        "Download or convert it again."
    )
