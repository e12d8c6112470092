"""The bytes of GGUF files: split, big-endian, quantized, damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from saccade.core import BadInput
from saccade.hf import load_model
from saccade.hf.gguf.file import parse_file
from saccade.hf.load import read_config
from tests.hf.converter import converted
from tests.hf.gguf_files import write_gguf
from tests.hf.test_gguf_architectures import IDS, make


def sentence_about(path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def split(tmp_path) -> list[Path]:
    write_gguf(make("llama"), tmp_path / "m.gguf", "llama", split_max_tensors=8)
    files = sorted(tmp_path.glob("m-*.gguf"))
    assert len(files) == 3
    return files


@torch.no_grad()
def test_any_file_of_a_split_model_stands_for_all(split):
    wanted = make("llama")(IDS).logits
    for file in split:
        loaded = load_model(file)
        torch.testing.assert_close(loaded.model(IDS).logits, wanted, atol=2e-5, rtol=1e-4)
        assert (loaded.name, loaded.notes) == ("m", [])
        assert loaded.tokenizer is not None
        assert read_config(file)[1:] == ("m", 128)


def test_a_shard_that_is_missing_is_named(split):
    split[1].unlink()
    assert f"beside it {split[1].name} is missing (1 of 3)" in sentence_about(split[0])


def test_a_shard_whose_name_does_not_tell_the_others(split, tmp_path):
    renamed = split[0].rename(tmp_path / "part.gguf")
    assert "expected a name that ends in -00001-of-00003.gguf" in sentence_about(renamed)


def test_a_shard_of_another_model(split):
    split[1].write_bytes(split[2].read_bytes())
    assert "it belongs to another model" in sentence_about(split[0])


def test_shards_that_repeat_a_tensor_or_lack_one(split, tmp_path):
    model = make("llama")
    write_gguf(model, tmp_path / "n.gguf", "llama", split_max_tensors=7)
    (tmp_path / "n-00003-of-00003.gguf").replace(split[2])
    message = sentence_about(split[0])
    assert "repeats the tensor" in message or "tensors" in message


def test_a_truncated_shard(split):
    split[2].write_bytes(split[2].read_bytes()[:-2000])
    assert f"{split[2].name} is truncated or damaged" in sentence_about(split[0])


@torch.no_grad()
def test_a_big_endian_file(tmp_path):
    model = make("llama 3")
    write_gguf(model, tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    got = load_model(tmp_path / "m.gguf").model(IDS).logits
    torch.testing.assert_close(got, model(IDS).logits, atol=2e-5, rtol=1e-4)


def test_a_big_endian_file_with_blocks_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    kinds = {"blk.0.ffn_up.weight": gguf.GGMLQuantizationType.Q8_0}
    write_gguf(make("llama"), path, "llama", endianess=gguf.GGUFEndian.BIG, quantized=kinds)
    assert "is big-endian and its tensor blk.0.ffn_up.weight is Q8_0" in sentence_about(path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantized_tensors_are_what_the_package_gguf_says(tmp_path, kind):
    model, name = make("qwen2"), "blk.1.ffn_up.weight"
    if kind not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"this version of gguf has no {kind}")
    code = gguf.GGMLQuantizationType[kind]
    write_gguf(model, tmp_path / "m.gguf", "qwen2", quantized={name: code})
    weight = converted(model, "qwen2")[1][name]
    wanted = gguf.dequantize(gguf.quantize(weight, code), code)
    got = load_model(tmp_path / "m.gguf").model.model.layers[1].mlp.up_proj.weight
    np.testing.assert_array_equal(got.detach().numpy(), wanted)


def test_experts_of_gpt_oss_in_mxfp4(tmp_path):
    model = make("gpt-oss")
    kind = gguf.GGMLQuantizationType.MXFP4
    names = [f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    write_gguf(model, tmp_path / "m.gguf", "gpt-oss", quantized=dict.fromkeys(names, kind))
    experts = load_model(tmp_path / "m.gguf").model.model.layers[0].mlp.experts
    for part, got in (("gate", experts.gate_up_proj[..., ::2]), ("down", experts.down_proj)):
        weight = converted(model, "gpt-oss")[1][f"blk.0.ffn_{part}_exps.weight"]
        wanted = gguf.dequantize(gguf.quantize(weight, kind), kind).swapaxes(1, 2)
        np.testing.assert_array_equal(got.detach().numpy(), wanted)


def test_half_precision(tmp_path):
    write_gguf(make("qwen2"), tmp_path / "m.gguf", "qwen2")
    model = load_model(tmp_path / "m.gguf", dtype=torch.bfloat16).model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


class Header:
    """The start of a GGUF file, by hand."""

    def __init__(self, keys: int = 1, tensors: int = 0, version: int = 3) -> None:
        self.data = b"GGUF" + struct.pack("<IQQ", version, tensors, keys)

    def text(self, content: bytes, length: int | None = None) -> Header:
        self.data += struct.pack("<Q", len(content) if length is None else length) + content
        return self

    def number(self, code: str, value: Any) -> Header:
        self.data += struct.pack("<" + code, value)
        return self


def array(kind: int, count: int) -> Header:
    return Header().text(b"a").number("I", 9).number("I", kind).number("Q", count)


HEADERS: dict[str, Header] = {
    "no end": Header(keys=2),
    "keys without end": Header(keys=2**63),
    "tensors without end": Header(keys=0, tensors=2**63),
    "a name without end": Header().text(b"a", 2**63),
    "a name that is no text": Header().text(b"\xff\xfe").number("I", 4).number("I", 1),
    "a value that is no text": Header().text(b"general.architecture").number("I", 8).text(b"\xff"),
    "an unknown type": Header().text(b"a").number("I", 77),
    "a list without end": array(4, 2**63),
    "a list of bytes without end": array(0, 2**62),
    "a list of texts without end": array(8, 2**60),
    "a list of lists": array(9, 2),
    "a key twice": Header(2).text(b"a").number("I", 7).number("B", 1).text(b"a").number("I", 7)
    .number("B", 1),
    "an alignment of zero": Header().text(b"general.alignment").number("I", 4).number("I", 0),
    "an alignment of three": Header().text(b"general.alignment").number("I", 4).number("I", 3),
    "nine dimensions": Header(0, 1).text(b"t").number("I", 9),
    "a tensor of nothing": Header(0, 1).text(b"t").number("I", 1).number("Q", 0).number("I", 0)
    .number("Q", 0),
    "a tensor without end": Header(0, 1).text(b"t").number("I", 2).number("Q", 2**40)
    .number("Q", 2**40).number("I", 0).number("Q", 0),
    "a tensor of no type": Header(0, 1).text(b"t").number("I", 1).number("Q", 4).number("I", 99)
    .number("Q", 0),
    "half a block": Header(0, 1).text(b"t").number("I", 1).number("Q", 5).number("I", 2)
    .number("Q", 0),
    "a tensor elsewhere": Header(0, 1).text(b"t").number("I", 1).number("Q", 1).number("I", 0)
    .number("Q", 64),
    "a tensor beyond the end": Header(0, 1).text(b"t").number("I", 1).number("Q", 4000)
    .number("I", 0).number("Q", 0),
}  # fmt: skip


@pytest.mark.parametrize("what", HEADERS)
def test_damaged_headers(tmp_path, what):
    path = tmp_path / "m.gguf"
    path.write_bytes(HEADERS[what].data + b"\0" * 200)
    assert "is truncated or damaged" in sentence_about(path)
    path.write_bytes(HEADERS[what].data)
    assert "is truncated or damaged" in sentence_about(path)


@pytest.mark.parametrize("version", [0, 1, 4, 2**31, 0x01000000])
def test_other_versions(tmp_path, version):
    path = tmp_path / "m.gguf"
    path.write_bytes(Header(version=version).data + b"\0" * 40)
    assert "expected version 2 or 3" in sentence_about(path)


def test_a_file_without_tensors(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(Header(keys=0).data)
    assert "holds no tensors" in sentence_about(path)


@pytest.mark.parametrize("kind", ["adapter", "mmproj", 3])
def test_files_that_are_no_model(tmp_path, kind):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_type(kind) if isinstance(kind, str) else writer.add_uint32("general.type", kind)
    writer.add_tensor("x", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "expected a whole language model" in sentence_about(tmp_path / "m.gguf")


def test_the_header_is_what_the_package_gguf_reads(tmp_path):
    write_gguf(make("llama 3"), tmp_path / "m.gguf", "llama")
    ours, reader = parse_file(tmp_path / "m.gguf"), gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    for key, value in ours.keys.items():
        texts = isinstance(value, list) and isinstance(value[0], bytes)
        assert ([item.decode() for item in value] if texts else value) == theirs.pop(key)
    assert theirs == {}
    for tensor in reader.tensors:
        info = ours.tensors.pop(tensor.name)
        assert (info.offset, info.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        np.testing.assert_array_equal(info.read().numpy(), tensor.data)
    assert ours.tensors == {}
