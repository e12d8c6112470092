"""The headers of a folder's weight files: where each tensor lies, before any is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from saccade.core import BadInput


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a safetensors file: `dtype` as the format names it, `start` from the file's."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


Tensors = dict[str, Stored]
_LONGEST_HEADER: Final = 100_000_000  # the limit of safetensors
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


def tensors_in(folder: Path) -> Tensors | None:
    """Tensor -> where it is; None where the folder has no safetensors.

    Raises:
        BadInput: a file is missing, truncated or damaged, or lacks a tensor that the index names.
    """
    if (folder / _SINGLE).is_file():
        return _header(folder / _SINGLE)
    if not (folder / _INDEX).is_file():
        return None
    places = _index(folder / _INDEX)
    lost = sorted({name for name in places.values() if not (folder / name).is_file()})
    if lost:
        raise BadInput(
            f"{folder} lacks {len(lost)} of its weight files: {named(lost)}. Download them again."
        )
    held: Tensors = {}
    for name in sorted(set(places.values())):
        held |= _header(folder / name)
    if absent := places.keys() - held.keys():
        raise BadInput(
            f"the weight files of {folder} lack {len(absent)} tensors that {_INDEX} names: "
            f"{named(absent)}. Download them again."
        )
    return held


def named(names: Iterable[str], most: int = 4) -> str:
    """Some of the names and how many more there are: "a, b and 7 more"."""
    shown = sorted(names)
    more = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {more} more" if more > 0 else "")


def _index(path: Path) -> dict[str, str]:
    try:
        places: Any = json.loads(path.read_bytes())["weight_map"]
        fine = all(type(place) is str and Path(place).name == place for place in places.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is damaged: expected a weight_map of file names.") from error
    if not fine or not places:
        raise BadInput(f"{path} is damaged: expected a weight_map of file names.")
    return places


def _header(path: Path) -> Tensors:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise _damaged(path, "its header is longer than the file")
        text = file.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        spans = sorted(tuple(entry["data_offsets"]) for entry in header.values())
        end = spans[-1][1] if spans else 0
        found = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        fine = all(type(math.prod(each.shape)) is int for each in found.values())
        fine = fine and all(size >= 0 for each in found.values() for size in each.shape)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise _damaged(path, "its header cannot be read") from error
    if not fine or type(end) is not int or end != size - 8 - length:
        raise _damaged(path, f"its tensors need {end} bytes, and it has {size - 8 - length}")
    return found


def _stored(path: Path, start: int, entry: dict[str, Any]) -> Stored:
    first, last = entry["data_offsets"]
    return Stored(path, entry.get("dtype", ""), tuple(entry["shape"]), start + first, last - first)


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} is truncated or damaged: {why}. Download or copy it again.")
