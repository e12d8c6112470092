"""A model split over several files (`NAME-00001-of-00003.gguf`): any of them stands for all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from saccade.core import BadInput
from saccade.hf.gguf.file import GGUFFile, parse_file

_SHARD: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PER_SHARD: Final = ("split.no",)


def read_gguf(path: Path) -> GGUFFile:
    """The keys and tensors of a file, or of all the files that it is a shard of.

    Raises:
        BadInput: damaged, or a shard is missing or belongs to another model.
    """
    one = parse_file(path)
    count = one.keys.get("split.count", 1)
    if type(count) is not int or count < 1:
        raise BadInput(f"{path} has split.count {count!r}: expected a number of files.")
    if count > 1:
        return _joined(
            path, [_shard(file, i, count) for i, file in enumerate(_siblings(path, count))]
        )
    return _with_tensors(one)


def shard_stem(path: Path) -> str:
    """The name of the model: the file's, without the number of a shard."""
    found = _SHARD.fullmatch(path.name)
    return found["stem"] if found else path.stem


def _siblings(path: Path, count: int) -> list[Path]:
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found["count"]) != count:
        raise BadInput(
            f"{path} is one of {count} files of a split model, and its name does not tell the "
            f"others: expected a name that ends in -00001-of-{count:05}.gguf."
        )
    files = [path.with_name(f"{found['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadInput(
            f"{path} is one of {count} files of a split model, and beside it {missing[0]} is "
            f"missing ({len(missing)} of {count}): put all of them into one folder."
        )
    return files


def _shard(path: Path, number: int, count: int) -> GGUFFile:
    shard = parse_file(path)
    stated = shard.keys.get("split.no"), shard.keys.get("split.count")
    if stated != (number, count):
        raise BadInput(
            f"{path} says that it is file {stated[0]} of {stated[1]} (counted from 0), its name "
            f"says {number} of {count}: it belongs to another model. Download it again."
        )
    return shard


def _joined(path: Path, shards: list[GGUFFile]) -> GGUFFile:
    keys: dict[str, Any] = {}
    tensors = {}
    for shard in shards:
        for key, value in shard.keys.items():
            if key not in _PER_SHARD and keys.setdefault(key, value) != value:
                raise BadInput(f"{shard.path} has another value of {key} than the other shards.")
        repeated = tensors.keys() & shard.tensors.keys()
        if repeated:
            raise BadInput(f"{shard.path} repeats the tensor {min(repeated)} of another shard.")
        tensors |= shard.tensors
    stated = keys.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise BadInput(f"the shards of {path} hold {len(tensors)} of {stated} tensors.")
    return _with_tensors(GGUFFile(shards[0].path, keys, tensors))


def _with_tensors(file: GGUFFile) -> GGUFFile:
    if not file.tensors:
        raise BadInput(f"{file.path} holds no tensors: expected the weights of a model.")
    return file
