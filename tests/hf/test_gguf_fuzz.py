"""Changed GGUF files and folders: a model or one sentence, never another error, never long.

The number of files is `SACCADE_FUZZ` (default some dozens a test).
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from saccade.core import BadInput
from saccade.hf import load_model
from tests.hf.converter import converted
from tests.hf.gguf_files import write_gguf
from tests.hf.test_gguf_architectures import AVAILABLE, CASES, make

EXAMPLES = int(os.environ.get("SACCADE_FUZZ", "15"))
LONGEST = 20.0
NUMBERS = (0, 1, 2, 7, 255, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1)
VALUES = (
    None, True, -1, 0, 1, 3, 2**31, 2**70, -(2**70), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "\udcff"[:0], [], [1], [None], {}, {"a": 1}, [[]], "9" * 400,
)  # fmt: skip


def outcome(path: Path) -> str:
    """How loading ended; another error than one sentence is raised."""
    start = time.perf_counter()
    try:
        load_model(path)
        end = "loaded"
    except BadInput as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        end = "refused"
    assert time.perf_counter() - start < LONGEST
    return end


def bytes_changed(data: bytes, chance: random.Random, header: int) -> bytes:
    """One to three changes: a bit, a byte, a length, a part that is lost, doubled or foreign."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(min(header, len(changed)) if chance.random() < 0.9 else len(changed))
        match chance.randrange(7):
            case 0:
                changed[at] ^= 1 << chance.randrange(8)
            case 1:
                changed[at] = chance.randrange(256)
            case 2:
                changed[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))
            case 3:
                changed[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) % 2**32)
            case 4:
                del changed[at : at + chance.randint(1, 40)]
            case 5:
                changed[at:at] = changed[at : at + chance.randint(1, 40)]
            case _:
                del changed[max(5, at) :]
        changed = changed or bytearray(b"G")
    return bytes(changed)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("fuzz")
    cases = ("llama 3", "gpt-oss", "lfm2", "stablelm 12b", "phi3 longrope", "bloom", "mamba")
    files = {}
    for case in (case for case in cases if case in AVAILABLE):
        write_gguf(make(case), folder / "m.gguf", CASES[case][0], tokens=case == "llama 3")
        files[case] = (folder / "m.gguf").read_bytes()
    return files


def test_changed_bytes(originals, tmp_path):
    ends = []
    for seed in range(EXAMPLES):
        chance = random.Random(seed)
        data = originals[chance.choice(sorted(originals))]
        header = data.find(b"general.architecture") + 6000
        (tmp_path / "m.gguf").write_bytes(bytes_changed(data, chance, header))
        ends.append(outcome(tmp_path / "m.gguf"))
    assert "refused" in ends


def test_changed_keys(tmp_path):
    """Values of another type and size, under the names that the file has."""
    for seed in range(EXAMPLES):
        chance = random.Random(seed)
        case = chance.choice(AVAILABLE)
        model = make(case)
        found, tensors = converted(model, CASES[case][0])
        keys: dict[str, Any] = {}
        for key in chance.sample(sorted(found), chance.randint(1, 3)):
            keys[key] = chance.choice(
                (None, True, 0, 1, 3, 5, 64, 2**31 - 1, 2**32 - 1, -1.0, 0.0, 0.5, 1e30, "x", "",
                 [1], [2, 0], [0, 0], [1.5, 2.5], ["a"], float("nan"), float("inf"))
            )  # fmt: skip
        names = sorted(name for name in tensors if ":" not in name)
        skip = tuple(chance.sample(names, chance.choice((0, 0, 1, 2))))
        write_gguf(model, tmp_path / "m.gguf", CASES[case][0], keys=keys, skip=skip, tokens=False)
        outcome(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    make("qwen2").save_pretrained(path)
    return path


def test_changed_configs(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    for seed in range(EXAMPLES):
        chance = random.Random(seed)
        changed = dict(config)
        for key in chance.sample(sorted(config), chance.randint(1, 3)):
            changed[key] = chance.choice(VALUES)
        rope = dict(config["rope_parameters"])
        rope[chance.choice(("rope_type", "rope_theta", "factor", "x"))] = chance.choice(VALUES)
        if chance.random() < 0.3:
            changed["rope_parameters"] = rope
        (tmp_path / "config.json").write_text(json.dumps(changed))
        outcome(tmp_path)


def test_changed_safetensors(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    data = (folder / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for seed in range(EXAMPLES):
        changed = bytes_changed(data, random.Random(seed), header)
        (tmp_path / "model.safetensors").write_bytes(changed)
        outcome(tmp_path)
